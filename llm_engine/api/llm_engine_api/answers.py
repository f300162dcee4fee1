"""What engines answer to /v1/completions, as this API's answers and events.

One form serves one HTTP request: it has the request's id and counts its tokens. No I/O.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

import orjson

from llm_engine.api import sse
from llm_engine.api.openai.answers import engine_error
from llm_engine.api.requests import EngineRequest
from llm_engine.errors import APIError, InternalError

#: So that no event comes near 64 KiB, where old aiohttp clients fail: a character takes at most
#: six bytes in JSON.
MOST_CHARACTERS = 8_000
#: What vLLM itself says for a token that could not have been chosen; JSON has no -inf.
IMPOSSIBLE = -9999.0

_BROKEN = ("abort", "error")

Token = dict[str, Any]


class CompletionForm:
    def __init__(self, *, log_probs: bool) -> None:
        self.request_id = str(uuid.uuid4())
        self._log_probs = log_probs
        self._prompt_tokens: int | None = None
        self._completion_tokens = 0
        self._last: tuple[str, list[Token]] | None = None  # held until all is counted
        self._finished = False
        self._seen, self._shown = b"", b""

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        told = output(orjson.loads(body), log_probs=self._log_probs)
        return orjson.dumps({"request_id": self.request_id, "output": told})

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        # The first event of an external model comes twice: to see whether it is one, and to send.
        if payload is not self._seen:
            self._seen, self._shown = payload, self._convert(payload)
        return self._shown

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        return engine_error(status, body, request)

    def failure(self, error: APIError) -> bytes:
        content = {"error": error.message, "timestamp": datetime.now(UTC).isoformat()}
        told = {"status_code": error.status, "content": content}
        event = {"request_id": self.request_id, "output": None, "error": told}
        return sse.event(orjson.dumps(event))

    def _convert(self, payload: bytes) -> bytes:
        if payload == sse.DONE:  # never sent: the client would take it for JSON
            return self._finish()
        chunk = orjson.loads(payload)
        usage = chunk.get("usage") or {}
        self._prompt_tokens = usage.get("prompt_tokens", self._prompt_tokens)
        if not chunk["choices"]:
            self._completion_tokens = usage.get("completion_tokens", self._completion_tokens)
            return self._finish() if usage and self._last is not None else b""
        choice = chunk["choices"][0]
        _check_whole(choice)
        text = choice.get("text") or ""
        tokens = _tokens(choice) if self._log_probs else []
        counted = self._completion_tokens + (len(tokens) or bool(text))
        self._completion_tokens = usage.get("completion_tokens", counted)
        if choice.get("finish_reason") is not None:
            self._last = text, tokens
            return b""
        return self._events(text, tokens)

    def _finish(self) -> bytes:
        if self._finished:
            return b""
        self._finished = True
        text, tokens = self._last or ("", [])
        return self._events(text, tokens)

    def _events(self, text: str, tokens: list[Token]) -> bytes:
        """One event a token, where tokens are told, and none too large; the text goes with the
        last token, since an engine may hold text back."""
        pieces = [text[i : i + MOST_CHARACTERS] for i in range(0, len(text), MOST_CHARACTERS)]
        last = pieces.pop() if pieces else ""
        rows: list[tuple[str, Token | None]] = [("", token) for token in tokens[:-1]]
        rows += [(piece, None) for piece in pieces]
        rows.append((last, tokens[-1] if tokens else None))
        before = self._completion_tokens - len(tokens)
        out = []
        for index, (piece, token) in enumerate(rows):
            finished = self._finished and index == len(rows) - 1
            output = {
                "text": piece,
                "finished": finished,
                "num_prompt_tokens": self._prompt_tokens if finished else None,
                "num_completion_tokens": min(before + index + 1, self._completion_tokens)
                if tokens
                else self._completion_tokens,
                "token": token,
            }
            event = {"request_id": self.request_id, "output": output, "error": None}
            out.append(sse.event(orjson.dumps(event)))
        return b"".join(out)


def output(answer: dict[str, Any], *, log_probs: bool) -> dict[str, Any]:
    """CompletionOutput of a whole answer. Raises InternalError where it is not whole."""
    choice = answer["choices"][0]
    _check_whole(choice)
    return {
        "text": choice["text"],
        "num_prompt_tokens": answer["usage"]["prompt_tokens"],
        "num_completion_tokens": answer["usage"]["completion_tokens"],
        "tokens": _tokens(choice) if log_probs else None,
    }


def _tokens(choice: dict[str, Any]) -> list[Token]:
    told = choice.get("logprobs") or {}
    pairs = zip(told.get("tokens") or (), told.get("token_logprobs") or (), strict=False)
    return [
        {"token": token, "log_prob": IMPOSSIBLE if value is None else value}
        for token, value in pairs
    ]


def _check_whole(choice: dict[str, Any]) -> None:
    if choice.get("finish_reason") in _BROKEN:
        raise InternalError(
            "The engine stopped before the answer was complete. Send the request again.",
            code="generation_interrupted",
        )
