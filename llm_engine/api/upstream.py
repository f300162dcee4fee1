"""External models: OpenAI-compatible servers elsewhere, called in the caller's place.

Their own key goes with a call, never the caller's. Redirects are not followed. What they answer
with is checked before a byte goes on; what is no answer is a 502 that says why.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import httpcore
import orjson

from llm_engine import __version__
from llm_engine.api import sse
from llm_engine.api.http import Call, until_gone
from llm_engine.api.network_guard import Allowed, GuardedBackend, Refused
from llm_engine.api.replicas import STREAM_HEADERS
from llm_engine.api.requests import EngineRequest, Form, Kind, rename
from llm_engine.errors import (
    APIError,
    BodyTooLarge,
    InvalidRequest,
    NotFound,
    Overloaded,
    TookTooLong,
    UpstreamAway,
    UpstreamFailed,
)
from llm_engine.records import ModelRecord
from llm_engine.services import Services

logger = logging.getLogger("llm_engine.api")

CONNECT_TIMEOUT_S = 5
#: Less than the 5 s after which common servers close an idle connection, so that no request is
#: sent into one that is just being closed.
KEEP_ALIVE_S = 4
MAX_ANSWER_BYTES = 64 * 2**20
MAX_EVENT_BYTES = 2**20
LAST_BYTES_S = 0.5  # how long the end of a stream may come after its [DONE]
MOST_TOKENS = 2**31  # of one answer; what is over it is no number of tokens
_SHOWN = 300  # characters of an upstream's own words
_USAGE = re.compile(rb'"usage":\s*\{')
_FINISHED = re.compile(rb'"finish_reason":\s*"')
_BAD_FORM = (ValueError, KeyError, TypeError, AttributeError, IndexError)
_BROKE_OFF = (
    APIError,
    TimeoutError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
)


def no_responses(model: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{model}' is an external model: it answers at /v1/chat/completions.",
        param="model",
        code="invalid_value",
    )


class Upstreams:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._limits = services.settings.gateway
        self._metrics = services.metrics
        self._safe = services.safe

    async def serve(
        self, call: Call, request: EngineRequest, form: Form, model: ModelRecord, shown: str
    ) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        if request.kind is Kind.RESPONSES:
            raise no_responses(shown)
        sent = rename(request, model.model or model.name, shown)
        key = self._safe.reveal(model.sealed_key) if model.sealed_key is not None else None
        exchange = _Exchange(replace(sent, shown=shown), form, shown, key)
        in_flight = self._metrics.in_flight.labels(model.name)
        in_flight.inc()
        try:
            async with until_gone(call):
                whole = await self._ask(call, exchange, model)
        except _FAILURES as error:
            raise self._failure(error, shown) from None
        finally:
            in_flight.dec()
            self._count(model, exchange.usage)
        # Only now that the upstream is done with: the server takes a client whose answer is
        # complete for one that has gone.
        if whole is None:
            await call.write(b"", more=False)
        else:
            await call.reply(200, whole)

    async def _ask(self, call: Call, exchange: "_Exchange", model: ModelRecord) -> bytes | None:
        """The whole answer; None where it was streamed."""
        limits = self._limits
        waited = time.perf_counter() - call.started
        timeouts = {
            "connect": CONNECT_TIMEOUT_S,
            "pool": CONNECT_TIMEOUT_S,
            "read": max(limits.request_timeout_s, limits.idle_timeout_s),
            "write": limits.request_timeout_s,
        }
        async with asyncio.timeout(limits.request_timeout_s - waited) as deadline:
            asking = self._connections().stream(
                "POST",
                _address(model, exchange.request),
                headers=_headers(exchange),
                content=exchange.request.body,
                extensions={"timeout": timeouts},
            )
            async with asking as answer:
                if answer.status != 200:
                    raise exchange.refusal(answer, await _read(answer))
                if not exchange.request.stream:
                    return exchange.answer(await _read(answer))
                async with contextlib.aclosing(_events(answer)) as events:
                    await self._stream(call, exchange, model, events, deadline)
        return None

    async def _stream(
        self,
        call: Call,
        exchange: "_Exchange",
        model: ModelRecord,
        events: AsyncIterator[bytes],
        deadline: asyncio.Timeout,
    ) -> None:
        """The first event decides whether there is an answer at all."""
        payload = await anext(events, None)
        if payload is None:
            raise exchange.nonsense("it ended without an event")
        out = exchange.event(payload)
        deadline.reschedule(None)
        await call.start(200, STREAM_HEADERS)
        self._metrics.first_token.labels(model.name).observe(time.perf_counter() - call.started)
        finished = False
        try:
            while payload != sse.DONE:
                finished = finished or _FINISHED.search(payload) is not None
                await call.write(out)
                async with asyncio.timeout(self._limits.idle_timeout_s):
                    payload = await anext(events, None)
                if payload is None and not finished:
                    raise exchange.nonsense("the stream ended too early")
                payload = payload or sse.DONE  # not every server says it
                out = exchange.event(payload)
            await call.write(out)
            with contextlib.suppress(*_BROKE_OFF):  # read to its end, a connection can be kept
                async with asyncio.timeout(LAST_BYTES_S):
                    await anext(events, None)
        except _BROKE_OFF as error:
            logger.warning("a stream of the external model %s broke off: %s", model.name, error)
            if not isinstance(error, APIError):
                silent = isinstance(error, TimeoutError | httpcore.TimeoutException)
                why = "was silent for too long" if silent else "broke off"
                error = exchange.nonsense(f"the stream {why}")
            await call.write(exchange.form.failure(error))

    def _failure(self, error: Exception, shown: str) -> APIError:
        """What a call that got no answer ends with."""
        match error:
            case Refused():
                return UpstreamFailed(f"The model '{shown}' cannot be called: {error}.")
            case httpcore.PoolTimeout():
                return Overloaded(
                    f"{self._limits.max_in_flight} calls to external models are under way "
                    "(gateway.max_in_flight). Retry later.",
                    param="model",
                    retry_after=self._limits.retry_after_s,
                )
            case httpcore.ConnectTimeout():
                why = f"accepts no connection within {CONNECT_TIMEOUT_S} s"
                return UpstreamAway(f"The upstream of '{shown}' {why}.", status=TookTooLong.status)
            case TimeoutError() | httpcore.TimeoutException():
                return TookTooLong(
                    f"The upstream of '{shown}' did not answer within "
                    f"{self._limits.request_timeout_s:g} s (gateway.request_timeout_s)."
                )
            case httpcore.ConnectError():
                return UpstreamAway(f"The upstream of '{shown}' cannot be reached: {error}.")
            case httpcore.LocalProtocolError() | httpcore.UnsupportedProtocol():
                # Its text repeats the header that cannot be sent, which may be the key.
                return UpstreamFailed(
                    f"The upstream of '{shown}' cannot be called as it was registered: its url "
                    "or its key holds characters that cannot be sent."
                )
        return UpstreamFailed(
            f"The upstream of '{shown}' cannot be reached: {str(error) or 'it hung up'}."
        )

    def _count(self, model: ModelRecord, usage: Any) -> None:
        """What the upstream says it has used; it may say nothing, or nonsense."""
        for kind in ("prompt", "completion"):
            tokens = usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None
            if isinstance(tokens, int) and 0 < tokens < MOST_TOKENS:
                self._metrics.upstream_tokens.labels(model.name, kind).inc(tokens)

    def _connections(self) -> httpcore.AsyncConnectionPool:
        services = self._services
        if services.upstream_pool is None:
            services.upstream_pool = httpcore.AsyncConnectionPool(
                max_connections=self._limits.max_in_flight,
                keepalive_expiry=KEEP_ALIVE_S,
                network_backend=GuardedBackend(Allowed(self._limits.allowed_upstreams)),
            )
        return services.upstream_pool


_FAILURES = (
    TimeoutError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)


@dataclass
class _Exchange:
    """One request to an upstream, and what its words mean to the caller."""

    request: EngineRequest
    form: Form
    shown: str
    key: str | None
    usage: Any = None  # what the upstream has told last

    def answer(self, whole: bytes) -> bytes:
        """Raises APIError where it is none."""
        try:
            parsed = orjson.loads(whole)
            if parsed.get("error"):
                raise self.told(500, whole)
            self.usage = parsed.get("usage")
            self._check_shape(parsed)
            return self.form.answer(self.request, whole)
        except _BAD_FORM:
            raise self.nonsense("it is not in OpenAI's form") from None

    def event(self, payload: bytes) -> bytes:
        """Raises APIError where the upstream gave up."""
        try:
            if b'"error"' in payload and orjson.loads(payload).get("error"):
                raise self.told(500, payload)
            if _USAGE.search(payload):
                # Some tell it with each event, as a running total: the last one counts.
                self.usage = orjson.loads(payload).get("usage")
            return self.form.event(self.request, payload)
        except _BAD_FORM:
            raise self.nonsense("an event is not in OpenAI's form") from None

    def nonsense(self, why: str) -> UpstreamFailed:
        return UpstreamFailed(f"The upstream of '{self.shown}' sent no proper answer: {why}.")

    def refusal(self, answer: httpcore.Response, body: bytes) -> APIError:
        if 300 <= answer.status < 400:
            return UpstreamFailed(
                f"The upstream of '{self.shown}' redirects elsewhere, which is not followed. "
                "Register the address that it redirects to."
            )
        error = self.told(answer.status, body)
        if answer.status in (429, 503):
            error.retry_after = _retry_after(answer)
        return error

    def told(self, status: int, body: bytes) -> APIError:
        """An upstream's error: the caller's own mistakes in its words, the rest as ours to
        answer for."""
        said = _error_object(body)
        code, param = (v if isinstance(v := said.get(k), str) else None for k in ("code", "param"))
        if isinstance(said.get("code"), int) and status == 500 and 400 <= said["code"] < 600:
            status = said["code"]  # an error inside a stream comes with HTTP status 200
        words = str(said.get("message") or said.get("detail") or "no reason given")[:_SHOWN]
        if self.key is not None:
            words = words.replace(self.key, "***")
        upstream = f"The upstream of '{self.shown}'"
        if status in (401, 403):
            return UpstreamFailed(
                f"{upstream} does not accept the key that was registered for it (HTTP {status})."
            )
        if status in (404, 405):
            return NotFound(
                f"{upstream} does not know the model or path: {words}",
                param="model",
                code="model_not_found",
            )
        if status == 413:
            return BodyTooLarge(f"{upstream}: {words}")
        if status == 429:
            return Overloaded(f"{upstream} has too many requests: {words}", param="model")
        # 402: the bill of whoever registered it; 408: its own impatience.
        if 400 <= status < 500 and status not in (402, 408):
            return InvalidRequest(words, param=param, code=code)
        kind = UpstreamAway if status == 503 else UpstreamFailed
        return kind(f"{upstream} failed (HTTP {status}): {words}")

    def _check_shape(self, answer: dict[str, Any]) -> None:
        """What clients take for granted. Raises one of _BAD_FORM, or UpstreamFailed."""
        rows = answer["data" if self.request.kind is Kind.EMBEDDINGS else "choices"]
        name = {Kind.CHAT: "message", Kind.COMPLETIONS: "text", Kind.EMBEDDINGS: "embedding"}
        part = name[self.request.kind]
        if not rows or not all(part in row for row in rows):
            raise self.nonsense("it holds no answer")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError
        # Base64 comes as a string.
        if part == "embedding" and not all(isinstance(row[part], list | str) for row in rows):
            raise TypeError


def _address(model: ModelRecord, request: EngineRequest) -> str:
    """The base as registered, its query kept, and the path that OpenAI's clients put after it."""
    assert model.url is not None
    base, mark, query = model.url.partition("?")
    return base.rstrip("/") + request.path.removeprefix("/v1") + mark + query


def _headers(exchange: _Exchange) -> list[tuple[bytes, bytes]]:
    accepted = b"text/event-stream" if exchange.request.stream else b"application/json"
    headers = [
        (b"content-type", b"application/json"),
        (b"accept", accepted),
        (b"accept-encoding", b"identity"),
        (b"user-agent", f"llm-engine/{__version__}".encode()),
    ]
    if exchange.key is not None:
        headers.append((b"authorization", b"Bearer " + exchange.key.encode()))
    return headers


async def _read(answer: httpcore.Response) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_stream():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise UpstreamFailed(f"The upstream's answer is larger than {MAX_ANSWER_BYTES} bytes.")
        parts.append(part)
    return b"".join(parts)


async def _events(answer: httpcore.Response) -> AsyncIterator[bytes]:
    """The payloads of `data:` events; lines end in \\n or \\r\\n. The last event of a stream may
    lack the empty line after it."""
    pieces: list[bytes] = []  # of a line that is not whole yet
    data: list[bytes] = []
    size = 0  # of what is held
    async for part in answer.aiter_stream():
        pieces.append(part)
        size += len(part)
        if size > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"The upstream sent an event of over {MAX_EVENT_BYTES} bytes.")
        if b"\n" not in part:
            continue
        *lines, rest = b"".join(pieces).split(b"\n")
        pieces = [rest] if rest else []
        for line in lines:
            if event := _end_of_event(line, data):
                yield event
        size = len(rest) + sum(map(len, data))
    for line in (b"".join(pieces), b""):
        if event := _end_of_event(line, data):
            yield event


def _end_of_event(line: bytes, data: list[bytes]) -> bytes | None:
    """Takes one line in; what the lines so far make, where this one is the empty one."""
    line = line.rstrip(b"\r")
    if line.startswith(b"data:"):
        data.append(line[5:].removeprefix(b" "))
    elif not line and data:
        event = b"\n".join(data)
        data.clear()
        return event
    return None


def _error_object(body: bytes) -> dict[str, Any]:
    """OpenAI's {"error": {...}}, or what others send in its place."""
    try:
        parsed = orjson.loads(body)
    except ValueError:
        return {}
    said = (parsed.get("error") or parsed) if isinstance(parsed, dict) else parsed
    return said if isinstance(said, dict) else {"message": said}


def _retry_after(answer: httpcore.Response) -> int:
    """Seconds. A date, or nothing: soon."""
    wait = next((v for k, v in answer.headers if k.lower() == b"retry-after"), b"")
    return int(wait) if wait.isdigit() and len(wait) < 8 else 1
