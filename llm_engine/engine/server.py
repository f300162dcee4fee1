"""The inside of an engine process: what every engine's HTTP server has in common.

Run as `python -m llm_engine.engine.<kind>` by `process.EngineProcess`, which writes one line of
JSON (the `EngineSpec`) to stdin and keeps stdin open: when it closes, the parent is gone and so
is this process. Two lines go back on stdout behind MARK: the port, or the cause of a failure.
"""

import ctypes
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llm_engine.config import BUILTIN, EndpointSettings
from llm_engine.engine.base import HEADER_BATCH, HEADER_SECRET, PATH_LOAD
from llm_engine.records import Load

MARK = "@llm-engine "
EXIT_FAILED = 3
_PR_SET_PDEATHSIG = 1

#: What this process serves; set once, by `run`.
_spec: "EngineSpec | None" = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    name: str  # what clients call the model
    model: str  # a folder or a hub id
    task: str  # generate | embed
    host: str
    secret: str = field(repr=False)
    max_queue: int
    tensor_parallel_size: int
    builtin: bool
    vllm_args: dict[str, Any]

    @classmethod
    def of(
        cls, settings: EndpointSettings, host: str = "127.0.0.1", secret: str = ""
    ) -> "EngineSpec":
        builtin = settings.model.startswith("builtin:")
        name = settings.model.removeprefix("builtin:")
        return cls(
            name=settings.name,
            model=str(BUILTIN[name]) if builtin else settings.model,
            task=settings.task,
            host=host,
            secret=secret,
            max_queue=settings.max_queue,
            tensor_parallel_size=settings.tensor_parallel_size,
            builtin=builtin,
            vllm_args=settings.vllm_args,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def tell(event: str, **facts: Any) -> None:
    print(MARK + json.dumps({"event": event, **facts}), flush=True)


def run(serve: Callable[[EngineSpec, socket.socket], None]) -> None:
    """Read the spec, listen, and hand both to `serve`, which returns when it is told to stop."""
    global _spec
    _spec = spec = EngineSpec(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Bound now and handed on, so that nobody can take the port while the model loads.
    listener.bind((spec.host, 0))
    tell("listening", port=listener.getsockname()[1])
    try:
        serve(spec, listener)
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            raise
        tell("failed", error=describe(error))
        sys.exit(EXIT_FAILED)


def describe(error: BaseException) -> str:
    """'Type: message' in one paragraph; of pydantic's report just what it found."""
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        found = [f"{e['msg']}".removeprefix("Value error, ") for e in error.errors()]
        text = "; ".join(found)
    else:
        text = f"{type(error).__name__}: {error}"
    first_paragraph = text.strip().split("\n\n")[0]
    return " ".join(first_paragraph.split())


def _die_with_parent() -> None:
    """The parent holds the other end of stdin; nothing is ever written to it after the spec."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os.killpg(0, signal.SIGKILL)


def die_when_parent_thread_does() -> None:
    """For the children of an engine process: the kernel kills them when their parent is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Guard:
    """ASGI middleware: only who holds the secret gets in; answers PATH_LOAD itself.

    Each engine derives its own, with `load`.
    """

    def __init__(self, app: Any) -> None:
        assert _spec is not None, "an engine process reads its spec before it builds its server"
        self._app = app
        self._secret = _spec.secret.encode()
        self._batches = 0  # texts for batches that are under way

    def load(self, app: Any) -> Load:
        """What the engine behind the ASGI application `app` is doing."""
        raise NotImplementedError

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not self._admits(scope):
            await _answer(send, 403, {"error": "this port is private to llm-engine"})
            return
        if scope["path"] == PATH_LOAD:
            load = replace(self.load(scope.get("app")), batches=self._batches)
            await _answer(send, 200, asdict(load))
            return
        texts = int(_header(scope, HEADER_BATCH) or 0)
        self._batches += texts
        try:
            await self._app(scope, receive, send)
        finally:
            self._batches -= texts

    def _admits(self, scope: Any) -> bool:
        return hmac.compare_digest(_header(scope, HEADER_SECRET), self._secret)


def _header(scope: Any, name: str) -> bytes:
    wanted = name.encode()
    return next((value for key, value in scope["headers"] if key == wanted), b"")


async def _answer(send: Any, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
