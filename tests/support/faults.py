"""A proxy in front of an HTTP server that does to requests what networks and servers do."""

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class Fault(Enum):
    #: Nothing comes back.
    HANG = auto()
    #: The connection breaks in the middle of what the client sends.
    CUT = auto()
    #: The server does it, and the connection breaks before the client hears of it.
    LOSE = auto()
    #: The connection breaks in the middle of what the client is sent.
    HALVE = auto()


@dataclass
class Answer:
    """In the server's place."""

    status: int
    code: str = ""

    @property
    def body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()


@dataclass
class FaultyProxy:
    """`with FaultyProxy(port) as proxy:` then `proxy.judge = lambda request, n: ...`.

    `judge` gets "METHOD /path?query" and how many requests with that method came before it.
    """

    server_port: int
    judge: Callable[[str, int], Fault | Answer | None] = lambda request, earlier: None
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def do_GET(self) -> None:
                request = f"{self.command} {self.path}"
                earlier = sum(each.startswith(f"{self.command} ") for each in proxy.requests)
                proxy.requests.append(request)
                verdict = proxy.judge(request, earlier)
                length = int(self.headers.get("content-length", 0))
                if verdict is Fault.HANG:
                    proxy._over.wait(60)
                    self.close_connection = True
                elif verdict is Fault.CUT:
                    self.rfile.read(length // 2)
                    self.close_connection = True
                elif isinstance(verdict, Answer):
                    self.rfile.read(length)
                    self.answer(verdict.status, {}, verdict.body)
                else:
                    self.forward(self.rfile.read(length), verdict)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def forward(self, body: bytes, fault: Fault | None) -> None:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                upstream = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=30)
                try:
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                finally:
                    upstream.close()
                if fault is Fault.LOSE:
                    self.close_connection = True
                    return
                self.answer(answer.status, dict(answer.getheaders()), content, fault)

            def answer(
                self, status: int, headers: dict, body: bytes, fault: Fault | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                told = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("content-length", told or str(len(body)))
                self.end_headers()
                if fault is Fault.HALVE:
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
