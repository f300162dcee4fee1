"""Bytes from an engine's private HTTP server, without a Ray handle or object in between.

A small HTTP/1.1 client for just this: parsed by httptools, pooled keep-alive connections, and
whatever has arrived since the last read handed on as one piece, so that coalescing happens
exactly when the reader is behind. Knows nothing of dialects.
"""

import asyncio
import time
from collections import defaultdict
from typing import cast

import httptools

from llm_engine.engine.base import HEADER_ADAPTER, HEADER_BATCH, HEADER_SECRET
from llm_engine.records import ReplicaReport

#: Idle connections are dropped before the engine's own keep-alive (120 s) would.
IDLE_CONNECTION_S = 60.0
MAX_IDLE_PER_ENGINE = 256
CONNECT_TIMEOUT_S = 3.0
#: Unread bytes at which reading from an engine pauses, and below which it goes on.
HIGH_WATER = 512 * 1024


class EngineLost(Exception):
    """The engine closed the connection or refused it."""


class EngineAbsent(EngineLost):
    """It takes no connection: nothing has been asked."""


class EngineSilent(EngineLost):
    """The deadline passed: the engine lives, and asking another would only repeat the work."""


class EngineConnection(asyncio.Protocol):
    """One connection; carries one request at a time. Use: `ask`, `head`, `read` until b""."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.idle_since = 0.0
        self.deadline = float("inf")  # the Pool's ticker fails the connection past it
        self._waiter: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._has_head = False
        self._complete = False
        self._keep_alive = False
        self._error: EngineLost | None = None
        self.status = 0

    # -- what the relay calls

    def ask(self, request: bytes, deadline: float) -> None:
        """Send a whole request; `deadline` is a time.monotonic() for the first byte."""
        if self.closed or self.transport is None:
            raise EngineLost("the connection is closed")
        self._reset()
        self.deadline = deadline
        self.transport.write(request)

    async def head(self) -> int:
        """The status code."""
        while not self._has_head:
            self._raise_if_lost()
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """All that has arrived of the body; waits for the first of it. b"" at the end."""
        while not self._pieces:
            if self._complete:
                return b""
            self._raise_if_lost()
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def read_all(self) -> bytes:
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    @property
    def reusable(self) -> bool:
        whole = self._complete and not self._pieces
        return whole and self._keep_alive and not self.closed and not self._paused

    def abort(self) -> None:
        """Close at once: the engine notices and stops generating."""
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def fail(self, error: EngineLost) -> None:
        self._error = error
        self.abort()
        self._wake()

    def _raise_if_lost(self) -> None:
        if self._error is not None:
            raise self._error
        if self.closed:
            raise EngineLost("the engine closed the connection")

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(EngineLost(f"the engine sent what is not HTTP: {error}"))
            return
        if self._unread > HIGH_WATER and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._wake()

    # -- httptools callbacks

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self._parser.should_keep_alive()  # known only within this callback


class Pool:
    """Keep-alive connections to every engine, and the ticker that enforces deadlines."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int], list[EngineConnection]] = defaultdict(list)
        self._active: set[EngineConnection] = set()
        self._ticker: asyncio.Task[None] | None = None

    async def take(self, replica: ReplicaReport, *, fresh: bool = False) -> EngineConnection:
        """A connection to this replica's engine; `fresh` opens a new one. Raises EngineLost."""
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        idle = self._idle[(replica.host, replica.port)]
        while idle and not fresh:
            connection = idle.pop()
            if not connection.closed:
                self._active.add(connection)
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                # asyncio and uvloop both set TCP_NODELAY on the sockets they make.
                _, connection = await loop.create_connection(
                    EngineConnection, replica.host, replica.port
                )
        except (OSError, TimeoutError) as error:
            raise EngineAbsent(f"the engine refuses connections: {error}") from None
        self._active.add(connection)
        return connection

    def give_back(self, replica: ReplicaReport, connection: EngineConnection) -> None:
        """After the answer was read to its end the connection is kept; before, it is cut."""
        self._active.discard(connection)
        connection.deadline = float("inf")
        idle = self._idle[(replica.host, replica.port)]
        if connection.reusable and len(idle) < MAX_IDLE_PER_ENGINE:
            connection.idle_since = time.monotonic()
            idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        for connection in [c for idle in self._idle.values() for c in idle] + list(self._active):
            connection.abort()
        self._idle.clear()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            for connection in list(self._active):
                if now > connection.deadline:
                    connection.fail(EngineSilent("the engine was silent for too long"))
            for key in list(self._idle):
                self._drop_stale(key, now)

    def _drop_stale(self, key: tuple[str, int], now: float) -> None:
        fresh = []
        for connection in self._idle[key]:
            if connection.closed or now - connection.idle_since > IDLE_CONNECTION_S:
                connection.abort()
            else:
                fresh.append(connection)
        if fresh:
            self._idle[key] = fresh
        else:
            del self._idle[key]


def post(
    replica: ReplicaReport, path: str, body: bytes, batch: int = 0, adapter: str | None = None
) -> bytes:
    """The bytes of a POST with a JSON body to an engine. `batch`: of a batch, and so
    many texts. `adapter`: the id of the one to answer with."""
    told = f"{HEADER_BATCH}: {batch}\r\n" if batch else ""
    if adapter is not None:
        told += f"{HEADER_ADAPTER}: {adapter}\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n{told}"
        f"{HEADER_SECRET}: {replica.secret}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
