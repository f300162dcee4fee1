"""External models: OpenAI-compatible servers elsewhere, called in the caller's place.

Their own key goes with a call, never the caller's. Redirects are not followed. What they answer
with is checked before a byte goes on; what is no answer is a 502 that says why.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpcore
import orjson

from llm_engine.api import sse
from llm_engine.api.http import Call, ClientGone
from llm_engine.api.limits import hold
from llm_engine.api.network_guard import Allowed, GuardedBackend, Refused
from llm_engine.api.replicas import STREAM_HEADERS
from llm_engine.api.requests import EngineRequest, Form, rename
from llm_engine.errors import (
    APIError,
    InvalidRequest,
    NotFound,
    Overloaded,
    TookTooLong,
    UpstreamFailed,
)
from llm_engine.records import ModelRecord
from llm_engine.services import Services

logger = logging.getLogger("llm_engine.api")

CONNECT_TIMEOUT_S = 5
MAX_ANSWER_BYTES = 64 * 2**20
MAX_EVENT_BYTES = 2**20
MAX_CONNECTIONS = 500
_SHOWN = 300  # characters of an upstream's own words


class Upstreams:
    def __init__(self, services: Services) -> None:
        self._limits = services.settings.gateway
        self._metrics = services.metrics
        self._safe = services.safe
        self._pool: httpcore.AsyncConnectionPool | None = None

    async def serve(
        self, call: Call, request: EngineRequest, form: Form, model: ModelRecord, shown: str
    ) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        sent = rename(hold(request, model), model.model or model.name, shown)
        request = replace(sent, shown=shown)
        in_flight = self._metrics.in_flight.labels(model.name)
        in_flight.inc()
        try:
            async with _until_gone(call):
                await self._ask(call, request, form, model)
        except Refused as error:
            raise UpstreamFailed(f"The model '{shown}' cannot be called: {error}.") from None
        except httpcore.TimeoutException:
            raise TookTooLong(
                f"The upstream of '{shown}' did not answer within "
                f"{self._limits.request_timeout_s:g} s (gateway.request_timeout_s)."
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
            raise UpstreamFailed(
                f"The upstream of '{shown}' cannot be reached: {str(error) or 'it hung up'}."
            ) from None
        finally:
            in_flight.dec()

    async def _ask(
        self, call: Call, request: EngineRequest, form: Form, model: ModelRecord
    ) -> None:
        assert model.url is not None
        url = model.url.rstrip("/") + request.path.removeprefix("/v1")
        headers = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
        if model.sealed_key is not None:
            key = self._safe.reveal(model.sealed_key)
            headers.append((b"authorization", b"Bearer " + key.encode()))
        timeouts = {
            "connect": CONNECT_TIMEOUT_S,
            "pool": CONNECT_TIMEOUT_S,
            "read": self._limits.request_timeout_s,
            "write": self._limits.request_timeout_s,
        }
        asking = self._connections().stream(
            "POST", url, headers=headers, content=request.body, extensions={"timeout": timeouts}
        )
        async with asking as answer:
            if answer.status != 200:
                raise _refusal(answer, await _read(answer), request)
            if request.stream:
                await self._stream(call, request, form, model, answer)
            else:
                whole = await _read(answer)
                self._count(model, whole)
                await call.reply(200, _converted(form, request, whole))

    async def _stream(
        self,
        call: Call,
        request: EngineRequest,
        form: Form,
        model: ModelRecord,
        answer: httpcore.Response,
    ) -> None:
        events = _events(answer, self._limits.idle_timeout_s)
        first = await anext(events, None)
        if first is None:
            raise _nonsense(request, "it ended without an event")
        if first.startswith(b'{"error"'):
            raise _told(500, first, request)
        if first != sse.DONE:
            _converted(form, request, first, event=True)  # raises while there can be an error
        await call.start(200, STREAM_HEADERS)
        self._metrics.first_token.labels(model.name).observe(time.perf_counter() - call.started)
        done = False
        payload: bytes | None = first
        try:
            while payload is not None:
                done = done or payload == sse.DONE
                if payload.startswith(b'{"error"'):
                    raise _told(500, payload, request)
                if b'"usage":{' in payload.replace(b" ", b""):
                    self._count(model, payload)
                await call.write(_converted(form, request, payload, event=True))
                payload = await anext(events, None)
            if not done:
                raise _nonsense(request, "the stream ended before [DONE]")
        except (APIError, httpcore.NetworkError, httpcore.ProtocolError, TimeoutError) as error:
            logger.warning("a stream of the external model %s broke off: %s", model.name, error)
            if not isinstance(error, APIError):
                error = _nonsense(request, "the stream broke off")
            await call.write(form.failure(error))
        await call.write(b"", more=False)

    def _count(self, model: ModelRecord, body: bytes) -> None:
        """What the upstream says it has used; it may say nothing, or nonsense."""
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            usage = orjson.loads(body).get("usage") or {}
            for kind in ("prompt", "completion"):
                tokens = max(0, int(usage.get(f"{kind}_tokens") or 0))
                self._metrics.upstream_tokens.labels(model.name, kind).inc(tokens)

    def _connections(self) -> httpcore.AsyncConnectionPool:
        if self._pool is None:
            self._pool = httpcore.AsyncConnectionPool(
                max_connections=MAX_CONNECTIONS,
                keepalive_expiry=30,
                network_backend=GuardedBackend(Allowed(self._limits.allowed_upstreams)),
            )
        return self._pool


@contextlib.asynccontextmanager
async def _until_gone(call: Call) -> AsyncIterator[None]:
    """Give up what is inside once the client has left. Raises ClientGone then."""
    task = asyncio.current_task()
    assert task is not None
    call.when_gone(task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not call.gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        call.when_gone(None)


async def _read(answer: httpcore.Response) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_stream():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise UpstreamFailed(f"The upstream's answer is larger than {MAX_ANSWER_BYTES} bytes.")
        parts.append(part)
    return b"".join(parts)


async def _events(answer: httpcore.Response, idle_s: float) -> AsyncIterator[bytes]:
    """The payloads of `data:` events, however their lines end."""
    stream = answer.aiter_stream()
    rest, data = b"", []
    while True:
        async with asyncio.timeout(idle_s):
            part = await anext(stream, None)
        if part is None:
            return
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"The upstream sent an event of over {MAX_EVENT_BYTES} bytes.")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _converted(form: Form, request: EngineRequest, body: bytes, event: bool = False) -> bytes:
    try:
        return form.event(request, body) if event else form.answer(request, body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _nonsense(request, "it is not in OpenAI's form") from None


def _nonsense(request: EngineRequest, why: str) -> UpstreamFailed:
    return UpstreamFailed(f"The upstream of '{request.shown}' sent no proper answer: {why}.")


def _refusal(answer: httpcore.Response, body: bytes, request: EngineRequest) -> APIError:
    if 300 <= answer.status < 400:
        return UpstreamFailed(
            f"The upstream of '{request.shown}' redirects elsewhere, which is not followed. "
            "Register the address that it redirects to."
        )
    error = _told(answer.status, body, request)
    if isinstance(error, Overloaded):
        wait = next((v for k, v in answer.headers if k.lower() == b"retry-after"), b"")
        error.retry_after = int(wait) if wait.isdigit() else 1
    return error


def _told(status: int, body: bytes, request: EngineRequest) -> APIError:
    """An upstream's error: the caller's own mistakes in its words, the rest as ours to answer."""
    name, said = request.shown, {}
    with contextlib.suppress(ValueError):
        parsed: Any = orjson.loads(body)
        said = parsed.get("error") or parsed if isinstance(parsed, dict) else {}
    if not isinstance(said, dict):
        said = {"message": said}
    words = str(said.get("message") or "no reason given")[:_SHOWN]
    code, param = (said.get(k) if isinstance(said.get(k), str) else None for k in ("code", "param"))
    if status in (401, 403):
        return UpstreamFailed(
            f"The upstream of '{name}' does not accept the key that was registered for it "
            f"(HTTP {status})."
        )
    if status == 404:
        return NotFound(
            f"The upstream of '{name}' does not know the model or path: {words}",
            param="model",
            code="model_not_found",
        )
    if status == 429:
        return Overloaded(f"The upstream of '{name}' has too many requests: {words}", param="model")
    if 400 <= status < 500:
        return InvalidRequest(words, param=param, code=code)
    return UpstreamFailed(f"The upstream of '{name}' failed (HTTP {status}): {words}")
