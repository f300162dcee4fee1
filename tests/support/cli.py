"""The command line, run in process, in a folder with a configuration of its own; and a stand-in
for the server that it talks to."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from click.testing import Result
from typer.testing import CliRunner

from llm_engine.cli.commands import app


def run(*words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=given)


def start(*words: str) -> subprocess.Popen[str]:
    """As a process, which hears Ctrl-C even if the tests run in the background of a shell."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from llm_engine.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, and once more where Python was in a place that swallows it; what it says then."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=4)[1]
    process.kill()
    process.communicate()
    raise AssertionError("Ctrl-C does not end it")


def write_configuration(folder: Path) -> None:
    """Far from this machine's own: a port that nothing answers on, a state folder inside."""
    told = {
        "gateway": {"port": 1},
        "endpoints": [{"name": "fake", "model": "x", "engine": "fake"}],
        "cluster": {"state_dir": str(folder / "state")},
    }
    (folder / "llm-engine.yaml").write_text(yaml.safe_dump(told))


class Server(ThreadingHTTPServer):
    """Answers what `answers` holds for a path, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answers: dict[str, tuple[int, object]] = {}
        self.asked: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(b"")

    def do_DELETE(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["content-length"])))

    def answer(self, body: bytes) -> None:
        question = {"path": self.path, "key": self.headers["authorization"]}
        self.server.asked.append(question | {"body": json.loads(body or b"null")})
        status, content = self.server.answers.get(self.path, (404, "nothing here"))
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    with Server(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
