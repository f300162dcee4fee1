"""The benchmark's own tools: statistics, the load generator against a small server, CPU clocks."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks import report, serving
from benchmarks.load import Job, Load, LoadError
from benchmarks.processes import MARK, Clock, used_between
from benchmarks.summary import alternate, differences, percentile, ratios

TOKENS = 5
Piece = tuple[float, bytes]  # wait so long, then send
CLOSE = b"<close>"  # as the last piece: the server closes the connection after the answer


def test_percentile_is_a_value_that_was_measured():
    assert percentile([5, 1, 3], 0.5) == 3
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7], 0.99) == 7
    with pytest.raises(ValueError):
        percentile([], 0.5)


def test_ratios_pair_the_rounds():
    slow_machine, fast_machine = (50, 100), (90, 180)
    ours, theirs = zip(slow_machine, fast_machine, strict=True)
    assert ratios(ours, theirs).median == 0.5  # each round gives 0.5, however fast it was
    assert differences([3, 5, 9], [1, 1, 1]).median == 4
    assert (ratios([1, 4], [2, 2]).low, ratios([1, 4], [2, 2]).high) == (0.5, 2)


def test_alternation_gives_every_target_every_place():
    assert [alternate("AB", n) for n in range(3)] == [["A", "B"], ["B", "A"], ["A", "B"]]
    assert {alternate("ABC", n)[0] for n in range(3)} == {"A", "B", "C"}


def test_goals_compare_with_the_baseline():
    def cell(tokens: float, ttft: float) -> list[dict[str, float]]:
        return [{"tokens_per_s": tokens, "ttft_p50": ttft}] * 3

    results = {
        ("stream", 1): {"vLLM": cell(100, 5), "llm-engine": cell(99, 9)},
        ("stream", 32): {"vLLM": cell(100, 20), "llm-engine": cell(90, 25)},
    }
    tokens, ttft, added = report.goal_lines(results, "vLLM")
    assert "reached" in tokens and "0.90x" in tokens
    assert "reached" in ttft and "1.25x" in ttft
    assert "missed" in added and "+4.00 ms" in added


def test_requests_differ_only_in_the_question():
    first, *others = (json.loads(body) for body in serving.bodies(TOKENS, stream=True))
    assert first["max_tokens"] == TOKENS and first["ignore_eos"] is True
    for other in others:
        assert other | {"messages": 0} == first | {"messages": 0}


# -- the load generator


def event(text: str) -> bytes:
    return b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % text.encode()


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % TOKENS


async def test_a_stream_is_timed_and_counted():
    events = [event(str(n)) for n in range(4)]
    middle = b"".join(events[1:3])  # arrive together: one gap
    pieces = [(0.02, events[0]), (0.01, middle), (0.01, events[3] + USAGE)]
    result, connections = await measure(lambda: pieces, stream=True, concurrency=3, requests=6)
    assert (result.requests, result.tokens, result.events) == (6, 6 * TOKENS, 6 * 6)
    assert connections == 3  # kept alive
    assert 20 <= result.ttft_p50 < 35
    assert 9 <= result.gap_p50 < 20
    assert 35 <= result.latency_p50 < 80
    assert result.tokens_per_s == pytest.approx(result.tokens / result.elapsed_s)


async def test_an_event_cut_in_two_counts_once():
    cut = event("x")
    pieces = [(0, cut[:-1]), (0.005, cut[-1:] + USAGE)]
    result, _ = await measure(lambda: pieces, stream=True)
    assert result.events == 3


async def test_a_whole_answer_is_timed_and_counted():
    answer = b'{"choices": [], "usage": {"completion_tokens": %d}}' % TOKENS
    result, _ = await measure(lambda: [(0.01, answer)], stream=False, concurrency=2, requests=4)
    assert (result.requests, result.tokens, result.ttft_p50) == (4, 4 * TOKENS, 0)
    assert result.latency_p99 >= 10


async def test_a_connection_that_was_closed_between_answers_is_opened_again():
    answers = iter(range(100))

    def pieces() -> list[Piece]:
        closing = [(0, CLOSE)] if next(answers) % 2 else []
        return [(0, event("x") + USAGE), *closing]

    result, connections = await measure(pieces, stream=True, requests=5)
    assert result.requests == 5
    assert result.reconnects == connections - 1 == 2


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, event("x") + USAGE.replace(b"5", b"4"))],  # too few tokens
        [(0, event("x") + USAGE.replace(b"data: [DONE]\n\n", b""))],  # broken off
    ],
)
async def test_a_wrong_answer_voids_the_measurement(pieces: list[Piece]):
    with pytest.raises(LoadError):
        await measure(lambda: pieces, stream=True)


async def test_an_error_status_voids_the_measurement():
    with pytest.raises(LoadError, match="HTTP 503"):
        await measure(lambda: [(0, USAGE)], stream=True, status=b"503 Busy")


async def measure(
    pieces: Callable[[], list[Piece]],
    stream: bool,
    concurrency: int = 1,
    requests: int = 1,
    status: bytes = b"200 OK",
):
    async with chunked_server(pieces, status) as (port, connections):
        job = Job("127.0.0.1", port, "/", {}, ("{}",), stream, concurrency, requests, TOKENS)
        load = Load(job)
        try:
            await load.warm_up()
            return await load.measure(), len(connections)
        finally:
            load.close()


@asynccontextmanager
async def chunked_server(
    pieces: Callable[[], list[Piece]], status: bytes
) -> AsyncIterator[tuple[int, list[object]]]:
    """HTTP/1.1 with a chunk a piece; keeps connections open."""
    connections: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                writer.write(b"HTTP/1.1 %s\r\ntransfer-encoding: chunked\r\n\r\n" % status)
                for wait, data in pieces():
                    if data is CLOSE:
                        break
                    await asyncio.sleep(wait)
                    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                writer.write(b"0\r\n\r\n")
                if data is CLOSE:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], connections


# -- CPU clocks


async def test_the_clock_sees_marked_processes_and_their_children():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    # The child drops the mark, as processes do that overwrite their own title.
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], env={{}})"
    script = f"{child}\nprint('done', flush=True)\ninput()"
    clock = Clock("of-this-test")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env=os.environ | {MARK: "of-this-test"},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        before = clock.read()
        while not process.stdout.at_eof():  # type: ignore[union-attr]
            clock.read()
            try:
                await asyncio.wait_for(process.stdout.readline(), 0.05)  # type: ignore[union-attr]
                break
            except TimeoutError:
                continue
        used = sum(used_between(before, clock.read()).values())
        assert 0.15 <= used < 3  # the child is gone, what it had used is still counted
    finally:
        await clock.end_all(grace_s=2)
    assert await process.wait() != 0
