"""Chat completions with `store: true`: kept while they are answered, and what is done with them
afterwards.

The end of an answer is held back until the store has it. Chats that are not to be kept never come
here.
"""

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any, Literal, Required

import orjson
from fastapi import APIRouter, Depends, Query, Request
from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from llm_engine.api import sse
from llm_engine.api.cold import having, read_json
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.openai import problems
from llm_engine.api.openai.answers import OpenAIForm
from llm_engine.api.openai.chunks import Chunks
from llm_engine.api.openai.fields import Metadata
from llm_engine.api.openai.files import list_row
from llm_engine.api.openai.fine_tuning import labels_of
from llm_engine.api.openai.requests import check_labels, not_in_batches
from llm_engine.api.requests import EngineRequest
from llm_engine.errors import APIError, InternalError, NotFound
from llm_engine.ids import new_id
from llm_engine.records import Principal, Scope
from llm_engine.responses import StoredChat
from llm_engine.services import Services
from llm_engine.store.chats import no_chat

Asker = Annotated[Principal, Depends(having(Scope.INFERENCE))]
Values = dict[str, Any]
Message = dict[str, Any]  # ASGI's

PATH = "/v1/chat/completions"
MOST_LABELS = 16
#: Events of a stream that is to be kept, for it is put together in memory.
MOST_BYTES = 32 * 2**20
#: What a stored chat tells of its request.
_TOLD = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"),
    *("tools", "tool_choice", "response_format"),
)


class ChangedChat(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]
    metadata: Required[Metadata | None]


_CHANGED: TypeAdapter[ChangedChat] = TypeAdapter(ChangedChat)


# -- answered


class StoredChats:
    def __init__(self, services: Services, dispatcher: Dispatcher) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._store = services.store.chats
        self._expires_s = services.settings.responses.expires_s

    async def answer(self, call: Call, request: EngineRequest, body: bytes) -> None:
        """As `Dispatcher.serve`. `body`: the request as it came. Raises StoreUnavailable where a
        whole answer cannot be kept; a stream then ends with that error."""
        call.require(Scope.INFERENCE)
        if call.principal.batch is not None:
            raise not_in_batches()
        asked = orjson.loads(body)
        request, form = await self._prepare(call, request)
        held = _Held(call, request.stream)
        try:
            await self._dispatcher.serve(held.inner, request, form)
        finally:
            call.status = held.inner.status
            held.inner.close()
        if form.failed:
            return await call.write(b"", more=False)
        try:
            await self._keep(call, asked, form.whole())
        except APIError as error:
            if not request.stream:
                raise
            return await call.write(form.failure(error), more=False)
        if request.stream:
            await call.write(sse.event(sse.DONE), more=False)
        else:
            await held.release()

    async def _prepare(
        self, call: Call, request: EngineRequest
    ) -> tuple[EngineRequest, "_KeepingForm"]:
        route = await self._services.route(call.principal, request.model, request.kind.task)
        if not request.stream:
            return replace(request, rewrite=True), _KeepingForm(hide_usage=False)
        data = orjson.loads(request.body)
        options = data.get("stream_options") or {}
        # Engines tell what was used only where they are asked; not every external server knows how.
        hidden = not options.get("include_usage") and route.endpoint is not None
        if hidden:
            data["stream_options"] = options | {"include_usage": True}
        kept = replace(request, body=orjson.dumps(data), rewrite=True)
        return kept, _KeepingForm(hide_usage=hidden)

    async def _keep(self, call: Call, asked: Values, answer: Values) -> None:
        now = time.time()
        request_id = call.request_id.decode("latin-1")
        told = {name: asked.get(name) for name in _TOLD}
        record = StoredChat(
            id=answer["id"],
            owner=call.principal.owner,
            model=answer["model"],
            created_at=now,
            expires_at=now + self._expires_s,
            metadata=asked.get("metadata") or {},
            request=asked,
            answer=told | {"request_id": request_id, "input_user": asked.get("user")} | answer,
        )
        await asyncio.to_thread(self._store.add, record)


class _KeepingForm(OpenAIForm):
    """OpenAI's, for one answer under an id that no other has, whoever gave it; but its [DONE] is
    left out. `whole` is what was answered."""

    def __init__(self, *, hide_usage: bool) -> None:
        self.failed = False
        self._id = new_id("chatcmpl", "-")
        self._hide_usage = hide_usage
        self._answer: bytes | None = None
        self._chunks = Chunks()
        self._size = 0

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        answer = super().answer(request, body)
        self._answer = orjson.dumps(orjson.loads(answer) | {"id": self._id})
        return self._answer

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        if payload == sse.DONE:
            self._answer = super().answer(request, orjson.dumps(self._chunks.whole()))
            return b""
        self._size += len(payload)
        if self._size > MOST_BYTES:
            raise InternalError(
                f"The answer's events have over {MOST_BYTES} bytes, the most that can be stored. "
                "Ask for fewer tokens, or without 'store'.",
                code="answer_too_large",
            )
        chunk = orjson.loads(payload) | {"id": self._id}
        shown = chunk
        if self._hide_usage:
            shown = {key: value for key, value in chunk.items() if key != "usage"}
        event = super().event(request, orjson.dumps(shown))
        self._chunks.add(chunk)
        # The chunk that tells the usage tells nothing else.
        return b"" if self._hide_usage and not chunk["choices"] else event

    def failure(self, error: APIError) -> bytes:
        self.failed = True
        return super().failure(error)

    def whole(self) -> Values:
        """Raises InternalError where the answer is not whole."""
        answer = orjson.loads(self._answer) if self._answer is not None else {}
        if not answer.get("choices"):
            raise InternalError(
                "The engine stopped before the answer was complete. Send the request again.",
                code="generation_interrupted",
            )
        return answer | {"usage": answer["usage"] or None}


class _Held:
    """The same call for the dispatcher: of a stream the end is left out, and all of a whole answer
    waits until it is released."""

    def __init__(self, call: Call, stream: bool) -> None:
        self._call = call
        self._stream = stream
        self._messages: list[Message] = []
        self.inner = Call(call.scope, call.receive, self._send, tell_id=False)
        self.inner.principal = call.principal
        self.inner.started = call.started
        self.inner.fixed_headers = call.fixed_headers

    async def release(self) -> None:
        for message in self._messages:
            await self._pass_on(message)

    async def _send(self, message: Message) -> None:
        if not self._stream:
            self._messages.append(message)
        elif message["type"] == "http.response.start":
            await self._pass_on(message)
        elif message["body"]:
            await self._pass_on({**message, "more_body": True})

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._call.started_answer = True
        await self._call.send(message)


# -- afterwards


def build_router(services: Services) -> APIRouter:
    router = APIRouter()
    store = services.store.chats

    async def own(who: Principal, chat: str) -> StoredChat:
        found = await asyncio.to_thread(store.get, chat)
        if not who.sees(found.owner):
            raise no_chat(chat)
        return found

    @router.get(PATH)
    async def list_chats(
        request: Request,
        who: Asker,
        model: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "asc",
    ) -> Values:
        labels = labels_of(list(request.query_params.multi_items()))
        if labels is None or len(labels) > MOST_LABELS:
            raise problems.invalid(
                f"Invalid 'metadata': expected at most {MOST_LABELS} pairs metadata[KEY]=VALUE.",
                "metadata",
                "invalid_value",
            )
        if "\0" in (model or ""):  # PostgreSQL knows no such text
            return list_row([], False)
        found, more = await asyncio.to_thread(
            lambda: store.page(
                who.whose, limit=limit, after=after, newest_first=order == "desc", model=model,
                metadata=labels,
            )
        )  # fmt: skip
        return list_row([show(record) for record in found], more)

    @router.get(PATH + "/{chat}")
    async def retrieve(chat: str, who: Asker) -> Values:
        return show(await own(who, chat))

    @router.post(PATH + "/{chat}")
    async def update(chat: str, request: Request, who: Asker) -> Values:
        metadata = problems.parse(_CHANGED, await read_json(request))["metadata"] or {}
        check_labels(metadata)
        await own(who, chat)
        return show(await asyncio.to_thread(store.change, chat, metadata))

    @router.delete(PATH + "/{chat}")
    async def delete(chat: str, who: Asker) -> Values:
        await own(who, chat)
        await asyncio.to_thread(store.delete, chat)
        return {"id": chat, "object": "chat.completion.deleted", "deleted": True}

    @router.get(PATH + "/{chat}/messages")
    async def messages(
        chat: str,
        who: Asker,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "asc",
    ) -> Values:
        found = message_rows(await own(who, chat))
        if order == "desc":
            found.reverse()
        if after is not None:
            places = [place for place, row in enumerate(found) if row["id"] == after]
            if not places:
                raise NotFound(f"Message with id '{after[:100]}' not found.", param="after")
            found = found[places[0] + 1 :]
        return list_row(found[:limit], len(found) > limit)

    return router


def show(record: StoredChat) -> Values:
    return record.answer | {"metadata": record.metadata}


def message_rows(record: StoredChat) -> list[Values]:
    """What was asked, each message with an id."""
    rows = []
    for number, message in enumerate(record.request["messages"]):
        content = message.get("content")
        in_parts = isinstance(content, list)
        told = {
            "id": f"{record.id}-{number}",
            "content": None if in_parts else content,
            "content_parts": content if in_parts else None,
        }
        rows.append({"name": None, "refusal": None} | message | told)
    return rows
