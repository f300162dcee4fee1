"""HTTP from a job to the gateways: the relay's connections, with the headers that a job listens to.

They cost a third of aiohttp's CPU, which a job may share with the engines, and nothing to import.
"""

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from llm_engine.errors import ConfigError
from llm_engine.relay import CONNECT_TIMEOUT_S, EngineConnection, EngineLost

#: Servers drop idle connections; ours are dropped before that.
IDLE_S = 2.0
MOST_IDLE = 256
LONGEST_ADVICE_S = 30.0


class Unreachable(Exception):
    """No gateway takes a connection: nothing has been asked."""


class Broken(Exception):
    """The answer did not come, or not to its end; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    request_id: str | None = None
    room: int | None = None  # requests of batches that the model can have under way
    retry_after_s: float | None = None


class _Connection(EngineConnection):
    headers: dict[bytes, bytes]

    def ask(self, request: bytes, deadline: float = float("inf")) -> None:
        self.headers = {}
        super().ask(request, deadline)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value


class Gateways:
    """Several addresses of one platform; the next one where one does not answer."""

    def __init__(self, urls: list[str], timeout_s: float) -> None:
        """`timeout_s`: of a whole answer. Raises ConfigError."""
        self._addresses = [_Address.of(url) for url in urls]
        if not self._addresses:
            raise ConfigError("no gateway is named")
        self._timeout_s = timeout_s
        self._current = 0
        self._idle: list[tuple[float, _Address, _Connection]] = []
        self._busy: set[_Connection] = set()

    async def get(self, path: str, ticket: str) -> Answer:
        return await self.ask(b"GET", path, b"", ticket)

    async def post(self, path: str, body: bytes, ticket: str) -> Answer:
        return await self.ask(b"POST", path, body, ticket)

    async def ask(self, method: bytes, path: str, body: bytes, ticket: str) -> Answer:
        """Raises Unreachable or Broken. Cancelled, it cuts the connection."""
        while True:
            address, connection, used = await self._take()
            message = address.message(method, path, body, ticket)
            try:
                async with asyncio.timeout(self._timeout_s):
                    connection.ask(message)
                    status = await connection.head()
                    content = await connection.read_all()
            except TimeoutError:
                raise Broken(f"no answer within {self._timeout_s:g} s") from None
            except EngineLost:
                if used and connection.status == 0:
                    continue  # it was closed while it was idle
                raise Broken("the connection broke before the answer was whole") from None
            finally:
                self._give_back(address, connection)
            return _answer(status, content, connection.headers)

    def close(self) -> None:
        """Cuts every connection: whoever answers notices and stops."""
        for connection in [*self._busy, *(each for _, _, each in self._idle)]:
            connection.abort()
        self._idle.clear()

    async def _take(self) -> tuple["_Address", _Connection, bool]:
        """A connection, and whether it has been used before. Raises Unreachable."""
        while self._idle:
            since, address, connection = self._idle.pop()
            if not connection.closed and time.monotonic() - since < IDLE_S:
                self._busy.add(connection)
                return address, connection, True
            connection.abort()
        first = self._current
        for step in range(len(self._addresses)):
            number = (first + step) % len(self._addresses)
            with contextlib.suppress(OSError, TimeoutError):
                connection = await self._addresses[number].connect()
                self._current = number
                self._busy.add(connection)
                return self._addresses[number], connection, False
        raise Unreachable("no gateway takes connections")

    def _give_back(self, address: "_Address", connection: _Connection) -> None:
        self._busy.discard(connection)
        if connection.reusable and len(self._idle) < MOST_IDLE:
            self._idle.append((time.monotonic(), address, connection))
        else:
            connection.abort()


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    tls: ssl.SSLContext | None
    shown: str  # in the Host header
    prefix: str

    @classmethod
    def of(cls, url: str) -> "_Address":
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if host is None or parts.scheme not in ("http", "https"):
            raise ConfigError(f"'{url}' is no gateway's address")
        secure = parts.scheme == "https"
        return cls(
            host,
            port or (443 if secure else 80),
            ssl.create_default_context() if secure else None,
            parts.netloc.rpartition("@")[2],
            parts.path.rstrip("/"),
        )

    async def connect(self) -> _Connection:
        """Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                _Connection, self.host, self.port, ssl=self.tls
            )
        return connection

    def message(self, method: bytes, path: str, body: bytes, ticket: str) -> bytes:
        head = (
            f"{self.prefix}{path} HTTP/1.1\r\nhost: {self.shown}\r\n"
            f"authorization: Bearer {ticket}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return b"%s %s%s" % (method, head.encode(), body)


def _answer(status: int, body: bytes, headers: dict[bytes, bytes]) -> Answer:
    room, advice = headers.get(b"x-llm-engine-room", b""), headers.get(b"retry-after", b"")
    request_id = headers.get(b"x-request-id")
    return Answer(
        status,
        body,
        None if request_id is None else request_id.decode("latin-1"),
        int(room) if room.isdigit() else None,
        min(float(advice), LONGEST_ADVICE_S) if advice.isdigit() else None,
    )
