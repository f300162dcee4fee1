"""The small HTTP client to engines, against a server that is told what to send."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from llm_engine.records import ReplicaReport
from llm_engine.relay import EngineLost, EngineSilent, Pool, post
from llm_engine.statuses import ReplicaState

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def engine(*answers: bytes) -> AsyncIterator[tuple[ReplicaReport, Pool, list[int]]]:
    """An engine that sends the next answer to each request; counts requests per connection."""
    left = list(answers)
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        mine = len(connections) - 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                connections[mine] += 1
                answer = left.pop(0)
                writer.write(answer.removesuffix(b"<cut>"))
                await writer.drain()
                if answer.endswith(b"<cut>"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = Pool()
    replica = ReplicaReport("m", "r", "1", ReplicaState.READY, "127.0.0.1", port, "secret")
    try:
        yield replica, pool, connections
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


async def ask(replica: ReplicaReport, pool: Pool, wait_s: float = 5) -> tuple[int, bytes]:
    connection = await pool.take(replica)
    try:
        connection.ask(post(replica, "/x", b"{}"), time.monotonic() + wait_s)
        return await connection.head(), await connection.read_all()
    finally:
        pool.give_back(replica, connection)


async def test_connections_are_kept_and_used_again():
    chunked = CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
    async with engine(WHOLE, chunked, WHOLE) as (replica, pool, connections):
        assert await ask(replica, pool) == (200, b"hello")
        assert await ask(replica, pool) == (200, b"abc")
        assert await ask(replica, pool) == (200, b"hello")
    assert connections == [3]


async def test_an_engine_that_says_close_is_not_asked_on_that_connection_again():
    closing = WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + b"<cut>"
    async with engine(closing, WHOLE) as (replica, pool, connections):
        await ask(replica, pool)
        await ask(replica, pool)
    assert connections == [1, 1]


@pytest.mark.parametrize(
    "answer",
    [
        b"<cut>",
        b"HTTP/1.1 200 OK\r\ncontent-le<cut>",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello<cut>",
        CHUNKED + b"3\r\nabc\r\n<cut>",
        b"nonsense\r\n\r\n<cut>",
    ],
)
async def test_an_answer_that_breaks_off_is_never_taken_for_a_whole_one(answer):
    async with engine(answer, WHOLE) as (replica, pool, connections):
        with pytest.raises(EngineLost):
            await ask(replica, pool)
        assert await ask(replica, pool) == (200, b"hello")
    assert connections == [1, 1]


async def test_silence_past_the_deadline_ends_the_wait():
    async with engine(CHUNKED) as (replica, pool, _):
        began = time.monotonic()
        with pytest.raises(EngineSilent):
            await ask(replica, pool, wait_s=0.2)
        assert time.monotonic() - began < 3


async def test_no_engine_there():
    async with engine() as (replica, pool, _):
        pass
    with pytest.raises(EngineLost, match="refuses"):
        await pool.take(replica)
    pool.close()


async def test_what_arrives_together_is_handed_on_together():
    pieces = b"".join(b"3\r\nabc\r\n" for _ in range(50)) + b"0\r\n\r\n"
    async with engine(CHUNKED + pieces) as (replica, pool, _):
        connection = await pool.take(replica)
        connection.ask(post(replica, "/x", b"{}"), time.monotonic() + 5)
        await asyncio.sleep(0.1)
        assert await connection.read() == b"abc" * 50
        assert await connection.read() == b""
        pool.give_back(replica, connection)


async def test_a_slow_reader_stops_the_engine_and_not_the_memory():
    big = b"x" * 8_000_000
    async with engine(b"HTTP/1.1 200 OK\r\ncontent-length: 8000000\r\n\r\n" + big) as (
        replica,
        pool,
        _,
    ):
        connection = await pool.take(replica)
        connection.ask(post(replica, "/x", b"{}"), time.monotonic() + 5)
        await connection.head()
        await asyncio.sleep(0.3)
        assert connection._unread < 2_000_000
        assert len(await connection.read_all()) == 8_000_000
        assert connection.reusable
        pool.give_back(replica, connection)
