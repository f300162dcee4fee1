"""What an engine answers, taken in: OpenAI's events on one side, what has come of it on the other.

vLLM's stream lacks some of OpenAI's events and has its own idea of others (reference: OpenAI's
streaming events, and vllm/entrypoints/openai/responses/streaming_events.py): it begins with its
own picture of the response and ends with `response.completed`, however it ended; every item is
completed, also the one that a limit has cut short. Here the picture is ours, and the end has the
name of what happened.
"""

from dataclasses import replace
from typing import Any

import orjson

from llm_engine.api.openai.answers import engine_error, keep_likeliest
from llm_engine.api.requests import EngineRequest
from llm_engine.api.responses.shown import show, usage_of
from llm_engine.errors import APIError, InternalError
from llm_engine.responses import Item, ResponseEnd, ResponseRecord
from llm_engine.statuses import ResponseState

Event = dict[str, Any]

_FIRST = frozenset({"response.created", "response.queued", "response.in_progress"})
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})
_ENDS = {
    "completed": ResponseState.COMPLETED,
    "incomplete": ResponseState.INCOMPLETE,
    "cancelled": ResponseState.CANCELLED,
}
#: Keys of items that are shown though they are null.
_NULLS = frozenset({"encrypted_content"})


class Turn:
    """A `Form` for one response. `take` gives the events so far; `end` is there once it is over."""

    def __init__(self, record: ResponseRecord, store: bool = True) -> None:
        self.record = record
        self.end: ResponseEnd | None = None
        self.told_output = False
        self._broken = False
        self._served: str | None = None
        self._store = store
        self._top_logprobs: int = record.request.get("top_logprobs") or 0
        self._sequence = record.told
        self._events: list[Event] = []
        self._items: dict[int, Item] = {}  # finished ones, by their place
        #: The end of an item, held back: whether it was cut short is known from what comes next.
        self._held: list[Event] = []

    # -- the dispatcher's side

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        self._finish(orjson.loads(body))
        return b""

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        event = orjson.loads(payload)
        kind = event.get("type")
        if kind in _LAST:
            self._finish(event["response"])
        elif kind not in _FIRST:
            self._pass_on(event)
        return b""

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        return engine_error(status, body, request)

    def failure(self, error: APIError) -> bytes:
        self._broken = error.status >= 500
        self.fail(error)
        return b""

    # -- the other side

    def answered_by(self, model: str | None) -> None:
        """It was another than was asked, if it is told."""
        if model is not None:
            self.record = replace(self.record, model=model)
            self._served = model

    def begin(self, *words: str) -> None:
        """Tell with these words that it has begun: created, queued, in_progress."""
        for word in words:
            shown = show(self.record, self._store)
            self._events.append({"type": f"response.{word}", "response": shown})

    def fail(self, error: APIError) -> None:
        """It broke off, or could not begin."""
        self._let_go()
        wrong = 400 <= error.status < 500 and error.status != 429
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.end = ResponseEnd(
            ResponseState.FAILED,
            output=self._output(),
            error={"code": "invalid_prompt" if wrong else code, "message": error.message},
        )

    @property
    def interrupted(self) -> bool:
        """The engine was lost before it told anything of its answer: it may be asked again."""
        failed = self.end is not None and self.end.state is ResponseState.FAILED
        return failed and self._broken and not self.told_output

    def close(self) -> ResponseEnd:
        """What has come of it, once the engine has nothing more to say."""
        if self.end is None:
            self.fail(InternalError("The engine stopped before the answer was complete."))
        assert self.end is not None
        return replace(self.end, model=self._served)

    def take(self) -> list[bytes]:
        """The events since the last time, in JSON."""
        events = [self._numbered(event) for event in self._events]
        self._events.clear()
        return events

    def last(self, ended: ResponseRecord) -> bytes:
        """The event that ends it, in JSON. What was not taken before is not told."""
        shown = show(ended, self._store)
        return self._numbered({"type": f"response.{ended.state}", "response": shown})

    # -- inside

    def _finish(self, told: Event) -> None:
        state = _ENDS.get(told.get("status") or "")
        if state is None:
            error = told.get("error") or {}
            return self.fail(InternalError(str(error.get("message") or "The engine failed.")))
        reason = (told.get("incomplete_details") or {}).get("reason")
        output = [self._item(item) for item in told.get("output") or ()]
        if len(self._items) == len(output):
            output = self._output()  # by the ids that were told already
        if state is ResponseState.INCOMPLETE:
            for item in (*output[-1:], *(event["item"] for event in self._held)):
                item["status"] = "incomplete"
        self._let_go()
        self.end = ResponseEnd(
            state,
            output=output,
            incomplete=reason or ("max_output_tokens" if state == "incomplete" else None),
            usage=usage_of(told.get("usage")),
            chosen={
                name: told[name]
                for name in ("temperature", "top_p")
                if self.record.request.get(name) is None and told.get(name) is not None
            },
        )

    def _pass_on(self, event: Event) -> None:
        self.told_output = True
        self._let_go()
        if "item" in event:
            event["item"] = self._item(event["item"])
        if "part" in event:
            event["part"] = self._part(event["part"])
        if event["type"] in ("response.output_text.delta", "response.output_text.done"):
            event["logprobs"] = self._logprobs(event)
        shown = {key: value for key, value in event.items() if value is not None}
        if event["type"] == "response.output_item.done":
            self._items[event["output_index"]] = event["item"]
            self._held.append(shown)
        else:
            self._events.append(shown)

    def _let_go(self) -> None:
        self._events += self._held
        self._held.clear()

    def _item(self, item: Item) -> Item:
        shown = {key: value for key, value in item.items() if value is not None or key in _NULLS}
        if isinstance(shown.get("content"), list):
            shown["content"] = [self._part(part) for part in shown["content"]]
        return shown

    def _part(self, part: Item) -> Item:
        if part.get("type") != "output_text":
            return {key: value for key, value in part.items() if value is not None}
        annotations = part.get("annotations") or []
        return part | {"annotations": annotations, "logprobs": self._logprobs(part)}

    def _logprobs(self, text: Item) -> list[Item]:
        found = text.get("logprobs") or []
        keep_likeliest(found, self._top_logprobs)
        return found

    def _output(self) -> list[Item]:
        return [self._items[place] for place in sorted(self._items)]

    def _numbered(self, event: Event) -> bytes:
        """In JSON. Only what is told has a number: there are no gaps."""
        numbered = event | {"sequence_number": self._sequence}
        self._sequence += 1
        return orjson.dumps(numbered)


def ended(record: ResponseRecord, end: ResponseEnd, at: float) -> ResponseRecord:
    """The record as it is then."""
    return replace(record, **end.of(record), ended_at=at)
