"""The load generator: a process of its own that keeps N requests in flight on N connections.

It shares the machine with what it measures, so it parses no more than it must: httptools for the
framing, a count of `data:` events, and the token count that the server itself reports at the end.
Run as `python -m benchmarks.load`: jobs come as lines of JSON on stdin, results go to stdout.
"""

import asyncio
import gc
import itertools
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import httptools
import uvloop

from benchmarks.summary import percentile

_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL = 1024  # bytes at the end of an answer in which its usage is found
TIMEOUT_S = 120


class LoadError(Exception):
    """An answer that is not what was asked for: the measurement is void."""


class Stale(Exception):
    """A kept connection that was closed before it answered: servers may, clients try again."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to send, how often, and what each answer must hold."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: tuple[str, ...]  # sent in turn
    stream: bool
    concurrency: int
    requests: int
    tokens: int  # that every answer must have

    def messages(self) -> list[bytes]:
        """The requests as bytes."""
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n{extra}"
            "content-type: application/json\r\ncontent-length: "
        )
        return [f"{head}{len(b.encode())}\r\n\r\n{b}".encode() for b in self.bodies]


class Connection(asyncio.Protocol):
    """A keep-alive connection that notes when what arrived. One request at a time."""

    def __init__(self, stream: bool) -> None:
        self._stream = stream
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._closed = False
        self._used = False
        self.gaps: list[float] = []  # between arrivals of events, seconds

    async def ask(self, message: bytes) -> None:
        """Raises Stale when another connection should be tried, LoadError when none should."""
        if self._closed:
            raise Stale
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._seen = self.events = 0
        self._heard = False
        self.tail = b""
        self.first = self.last = 0.0
        self.started = time.perf_counter()
        assert self._transport is not None
        self._transport.write(message)
        await self._done
        self.ended = time.perf_counter()
        self._used = True

    def check(self, tokens: int) -> int:
        """The tokens that the answer reports; raises LoadError if it is not a whole answer."""
        status = self._parser.get_status_code()
        found = _TOKENS.findall(self.tail)
        # A stream without usage (the fake engine's) has a token an event, less [DONE].
        made = int(found[-1]) if found else self.events - 1
        if status != 200 or made != tokens or (self._stream and not self._finished()):
            raise LoadError(
                f"HTTP {status} with {made} tokens, not {tokens}: ...{self.tail[-300:]!r}"
            )
        return made

    def _finished(self) -> bool:
        return self.tail.rstrip().endswith(b"data: [DONE]")

    # -- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._heard = True
        self._parser.feed_data(data)
        if self.events != self._seen:
            if self._seen:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self._seen = self.events
            self.last = now

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._done is not None and not self._done.done():
            stale = self._used and not self._heard
            lost = LoadError(f"the server closed the connection in an answer ({exc})")
            self._done.set_exception(Stale() if stale else lost)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # -- httptools callbacks

    def on_body(self, body: bytes) -> None:
        if self._stream:
            self.events += body.count(b"\n\n")
            if self.tail.endswith(b"\n") and body.startswith(b"\n"):
                self.events += 1  # its end fell between two pieces
        self.tail = (self.tail + body)[-_TAIL:]

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


@dataclass(slots=True)
class Result:
    """One measurement; times in milliseconds."""

    requests: int
    tokens: int
    events: int
    elapsed_s: float
    client_cpu_s: float
    reconnects: int  # kept connections that the server had closed
    latency_p50: float
    latency_p99: float
    ttft_p50: float = 0.0  # of streams: to the first event
    ttft_p99: float = 0.0
    gap_p50: float = 0.0  # between two arrivals of events, however many came together
    gap_p99: float = 0.0
    token_p50: float = 0.0  # mean time a token after the first, one value a request
    token_p99: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.elapsed_s


class Load:
    """One job: connect and warm up, then measure."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._messages = itertools.cycle(job.messages())
        self._connections: list[Connection] = []
        self._latencies: list[float] = []
        self._first: list[float] = []
        self._per_token: list[float] = []
        self._tokens = self._events = self._reconnects = 0

    async def warm_up(self) -> None:
        """Connect, and let every connection carry one request: servers open theirs now, too."""
        for _ in range(self._job.concurrency):
            self._connections.append(await self._connect())
        await asyncio.gather(*(self._ask(n) for n in range(self._job.concurrency)))
        self._forget()

    async def measure(self) -> Result:
        left = iter(range(self._job.requests))
        gc.collect()
        gc.disable()
        cpu, started = time.process_time(), time.perf_counter()
        await asyncio.gather(*(self._work(n, left) for n in range(self._job.concurrency)))
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        gc.enable()
        return self._result(elapsed, cpu)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._job.stream), self._job.host, self._job.port
        )
        return connection

    async def _work(self, number: int, left: Any) -> None:
        for _ in left:  # shared: whoever is free takes the next
            await self._ask(number)

    async def _ask(self, number: int) -> None:
        connection, message = self._connections[number], next(self._messages)
        async with asyncio.timeout(TIMEOUT_S):
            try:
                await connection.ask(message)
            except Stale:
                self._reconnects += 1
                gaps = connection.gaps
                connection = self._connections[number] = await self._connect()
                connection.gaps = gaps
                await connection.ask(message)
        tokens = connection.check(self._job.tokens)
        self._tokens += tokens
        self._events += connection.events
        self._latencies.append(connection.ended - connection.started)
        if self._job.stream:
            self._first.append(connection.first - connection.started)
            if tokens > 1:
                self._per_token.append((connection.last - connection.first) / (tokens - 1))

    def _forget(self) -> None:
        self._tokens = self._events = self._reconnects = 0
        for times in (self._latencies, self._first, self._per_token):
            times.clear()
        for connection in self._connections:
            connection.gaps.clear()

    def _result(self, elapsed: float, cpu: float) -> Result:
        gaps = [gap for connection in self._connections for gap in connection.gaps]

        def ms(values: list[float], share: float) -> float:
            return percentile(values, share) * 1000 if values else 0.0

        return Result(
            requests=len(self._latencies),
            tokens=self._tokens,
            events=self._events,
            elapsed_s=elapsed,
            client_cpu_s=cpu,
            reconnects=self._reconnects,
            latency_p50=ms(self._latencies, 0.5),
            latency_p99=ms(self._latencies, 0.99),
            ttft_p50=ms(self._first, 0.5),
            ttft_p99=ms(self._first, 0.99),
            gap_p50=ms(gaps, 0.5),
            gap_p99=ms(gaps, 0.99),
            token_p50=ms(self._per_token, 0.5),
            token_p99=ms(self._per_token, 0.99),
        )


class LoadProcess:
    """The parent's end: `warm_up(job)`, read the servers' CPU clocks, `measure()`."""

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.load",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**20,
        )  # fmt: skip

    async def warm_up(self, job: Job) -> None:
        await self._say(asdict(job))

    async def measure(self) -> Result:
        return Result(**await self._say("go"))

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()

    async def _say(self, message: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        line = await self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the load generator ended"}
        if "error" in answer:
            raise LoadError(answer["error"])
        return answer


async def serve_jobs() -> None:
    loop = asyncio.get_running_loop()

    async def read() -> Any:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        return json.loads(line) if line else None

    while (given := await read()) is not None:
        load = Load(Job(**given))
        try:
            await load.warm_up()
            print("{}", flush=True)
            await read()
            print(json.dumps(asdict(await load.measure())), flush=True)
        except (LoadError, OSError, TimeoutError, httptools.HttpParserError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        finally:
            load.close()


if __name__ == "__main__":
    uvloop.run(serve_jobs())
