"""The inside of an engine process: what every engine's HTTP server has in common.

Run as `python -m llm_engine.engine.<kind>` by `process.EngineProcess`, which writes one line of
JSON (the `EngineSpec`) to stdin and keeps stdin open: when it closes, the parent is gone and so
is this process. Two lines go back on stdout behind MARK: the port, or the cause of a failure.
"""

import asyncio
import ctypes
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llm_engine.config import BUILTIN, EndpointSettings
from llm_engine.engine.adapters import AdapterFailed, Adapters, AdapterSource, Host
from llm_engine.engine.base import (
    HEADER_ADAPTER,
    HEADER_BATCH,
    HEADER_SECRET,
    PATH_FORGET,
    PATH_LOAD,
    AdapterProblem,
)
from llm_engine.engine.turns import TooMany
from llm_engine.records import Load

MARK = "@llm-engine "
EXIT_FAILED = 3
EVENTS = b"text/event-stream"
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
    weights: str = ""  # the model, as the endpoint's settings have it
    max_adapters: int = 0
    max_adapter_rank: int = 16
    adapters: dict[str, Any] | None = None  # AdapterSource; None: there are none

    @classmethod
    def of(
        cls,
        settings: EndpointSettings,
        host: str = "127.0.0.1",
        secret: str = "",
        adapters: AdapterSource | None = None,
    ) -> "EngineSpec":
        builtin = settings.model.startswith("builtin:")
        name = settings.model.removeprefix("builtin:")
        return cls(
            name=settings.name,
            model=str(BUILTIN[name]) if builtin else os.path.expanduser(settings.model),
            task=settings.task,
            host=host,
            secret=secret,
            max_queue=settings.max_queue,
            tensor_parallel_size=settings.tensor_parallel_size,
            builtin=builtin,
            vllm_args=settings.vllm_args,
            weights=settings.model,
            max_adapters=settings.adapter_slots,
            max_adapter_rank=settings.max_adapter_rank,
            adapters=asdict(adapters) if adapters is not None else None,
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
    """ASGI middleware: only who holds the secret gets in; answers PATH_LOAD and PATH_FORGET itself;
    sees to it that the engine has the adapter that a request is for.

    Each engine derives its own, with `load` and, if it takes adapters, `host`.
    """

    def __init__(self, app: Any) -> None:
        assert _spec is not None, "an engine process reads its spec before it builds its server"
        self._app = app
        self._spec = _spec
        self._secret = _spec.secret.encode()
        self._batches = 0  # texts for batches that are under way
        self._adapters: Adapters | None = None  # once one is asked for

    def load(self, app: Any) -> Load:
        """What the engine behind the ASGI application `app` is doing."""
        raise NotImplementedError

    def problem(self, error: Exception) -> dict[str, Any]:
        """What an engine says of an error, in OpenAI's form."""
        message = f"{type(error).__name__}: {error}"
        return {"error": {"message": message, "type": "InternalServerError", "code": 500}}

    def host(self, app: Any) -> tuple[Host, int]:
        """Who loads adapters into that engine, and how many it keeps in memory."""
        raise NotImplementedError

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not self._admits(scope):
            await _answer(send, 403, {"error": "this port is private to llm-engine"})
            return
        if scope["path"] == PATH_LOAD:
            await _answer(send, 200, asdict(self._whole_load(scope.get("app"))))
            return
        if scope["path"] == PATH_FORGET:
            await self._forget(receive, send)
            return
        texts = int(_header(scope, HEADER_BATCH) or 0)
        adapter = _header(scope, HEADER_ADAPTER).decode("latin-1")
        self._batches += texts
        try:
            if adapter:
                await self._with_adapter(adapter, bool(texts), scope, receive, send)
            else:
                await self._ask(scope, receive, send)
        finally:
            self._batches -= texts

    async def _ask(self, scope: Any, receive: Any, send: Any) -> None:
        """A stream that breaks off says why: else what is wrong with a request, and is noticed only
        once its stream has begun, would look like an engine that died over it."""
        streams = False

        async def watched(message: Any) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                streams = any(value.startswith(EVENTS) for _, value in message["headers"])
            elif not message.get("more_body"):
                streams = False
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if not streams:
                raise
            # The server's way to say that it came too late for an answer of its own.
            cause = error.__cause__ if type(error) is RuntimeError else None
            said = self.problem(cause if isinstance(cause, Exception) else error)
            event = b"data: " + json.dumps(said).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event})

    def _whole_load(self, app: Any) -> Load:
        load = replace(self.load(app), batches=self._batches)
        if self._adapters is None:
            return load
        waiting = load.waiting + self._adapters.waiting
        return replace(load, waiting=waiting, adapters=self._adapters.loaded)

    async def _with_adapter(
        self, adapter: str, deferred: bool, scope: Any, receive: Any, send: Any
    ) -> None:
        if self._spec.max_adapters == 0 or self._spec.adapters is None:
            await _refuse(send, AdapterProblem.ELSEWHERE, "a replica serves no adapters.")
            return
        if self._adapters is None:
            self._adapters = self._make_adapters(scope.get("app"))
        caller = Caller(receive)
        async with AsyncExitStack() as stack:
            using = self._adapters.use(adapter, deferred)
            try:
                if not await caller.stays_for(stack.enter_async_context(using)):
                    return
            except AdapterFailed as failed:
                await _refuse(send, failed.problem, str(failed))
            except TooMany:
                await _answer(send, 503, {"error": {"message": "queue full", "code": 503}})
            else:
                await self._ask(scope, caller.receive, send)

    def _make_adapters(self, app: Any) -> Adapters:
        from llm_engine.engine.adapter_cache import AdapterCache

        spec = self._spec
        cache = AdapterCache.of(AdapterSource(**(spec.adapters or {})))
        host, kept = self.host(app)
        return Adapters(
            cache.open, cache.remove, host,
            weights=spec.weights, slots=spec.max_adapters, kept=kept, most_waiting=spec.max_queue,
        )  # fmt: skip

    async def _forget(self, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        if self._adapters is not None:
            await self._adapters.forget(json.loads(body)["adapters"])
        await _answer(send, 200, {})

    def _admits(self, scope: Any) -> bool:
        return hmac.compare_digest(_header(scope, HEADER_SECRET), self._secret)


class Caller:
    """Who has sent a request that must wait: `receive` gives what came in the meantime, too."""

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._received: list[Any] = []

    async def receive(self) -> Any:
        return self._received.pop(0) if self._received else await self._receive()

    async def stays_for(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Whether `work` came to its end before the caller left; else it is cancelled. Raises what
        `work` does."""
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not working.done():
                working.cancel()
            await asyncio.wait([working, leaving])
        if working.cancelled():
            return False
        working.result()
        return True

    async def _until_gone(self) -> None:
        while True:
            message = await self._receive()
            self._received.append(message)
            if message["type"] == "http.disconnect":
                return


async def _refuse(send: Any, problem: AdapterProblem, message: str) -> None:
    error = {"message": message, "type": problem, "code": problem.status}
    await _answer(send, problem.status, {"error": error})


def _header(scope: Any, name: str) -> bytes:
    wanted = name.encode()
    return next((value for key, value in scope["headers"] if key == wanted), b"")


async def _answer(send: Any, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
