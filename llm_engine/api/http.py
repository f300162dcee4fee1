"""Small pieces of HTTP over ASGI that every dialect uses."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from llm_engine import records
from llm_engine.errors import APIError, BodyTooLarge, Forbidden
from llm_engine.records import Principal

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
NOBODY = Principal("", frozenset())


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Call:
    """One request: its id, when it came, and whether the client is still there."""

    __slots__ = ("_on_gone", "_watch", "fixed_headers", "gone", "principal", "receive", "render",
                 "request_id", "scope", "send", "started", "started_answer", "status")  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, tell_id: bool) -> None:
        """`tell_id`: this answer must carry x-request-id itself; nobody adds it further out."""
        self.scope, self.receive, self.send = scope, receive, send
        self.started = time.perf_counter()
        self.request_id = self.header(b"x-request-id") or b"req_" + uuid.uuid4().hex.encode()
        self.fixed_headers = [(b"openai-version", b"2020-10-01")]
        if tell_id:
            self.fixed_headers.append((b"x-request-id", self.request_id))
        self.principal = NOBODY
        self.render: Callable[[APIError], bytes] = openai_error
        self.status = 0
        self.started_answer = False
        self.gone = False
        self._watch: asyncio.Task[None] | None = None
        self._on_gone: Callable[[], None] | None = None

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.scope["headers"] if key == name), None)

    def require(self, scope: records.Scope) -> None:
        """Raises Forbidden for a key without it."""
        require(self.principal, scope)

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises BodyTooLarge past `limit` bytes, ClientGone if it never ends."""
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def when_gone(self, callback: Callable[[], None] | None) -> None:
        """Call back once if the client leaves; None: no more. Only after the body was read."""
        self._on_gone = callback
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_client())
        elif self.gone and callback is not None:
            callback()

    async def _watch_client(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._on_gone is not None:
            self._on_gone()

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        self.started_answer = True
        spent = b"%d" % ((time.perf_counter() - self.started) * 1000)
        headers = [*headers, (b"openai-processing-ms", spent), *self.fixed_headers]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def reply(self, status: int, content: bytes, headers: Headers | None = None) -> None:
        size = (b"content-length", b"%d" % len(content))
        await self.start(status, [JSON, size, *(headers or [])])
        await self.write(content, more=False)

    async def fail(self, error: APIError) -> None:
        headers = []
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.reply(error.status, self.render(error), headers)

    def close(self) -> None:
        self._on_gone = None
        if self._watch is not None:
            self._watch.cancel()


@contextlib.asynccontextmanager
async def until_gone(call: Call) -> AsyncIterator[None]:
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


def require(who: Principal, scope: records.Scope) -> None:
    if not who.may(scope):
        raise Forbidden(
            f"This API key lacks the scope '{scope}'. Ask an operator for a key that has it."
        )


def openai_error(error: APIError) -> bytes:
    return orjson.dumps(error.body())


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {limit} bytes, the limit of this server "
        "(gateway.max_body_bytes)."
    )
