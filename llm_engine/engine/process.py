"""The outside of an engine process: start it, watch it, say why it died, end all of it."""

import asyncio
import collections
import json
import logging
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Collection
from typing import Any

import httpx

from llm_engine.config import SECRETS, EndpointSettings
from llm_engine.engine.adapters import AdapterSource
from llm_engine.engine.base import HEADER_SECRET, PATH_FORGET, PATH_LOAD, Engine, EngineAddress
from llm_engine.engine.server import MARK, EngineSpec
from llm_engine.errors import EngineError
from llm_engine.records import Load

logger = logging.getLogger("llm_engine.engine")

KEPT_LINES = 400  # of the engine's output, to find the cause of a failure in
STOP_GRACE_S = 10
PROBE_TIMEOUT_S = 10
LOAD_TIMEOUT_S = 1
#: "ValueError: ..." at the end of a traceback, wherever the log prefix puts it.
_EXCEPTION = re.compile(r"\b([A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (.+)$")
#: Says only that the cause stands elsewhere.
_SECONDARY = ("See root cause above", "Engine core proc", "EngineCore encountered an issue")


class EngineProcess(Engine):
    """An engine as a child process in a process group of its own."""

    def __init__(
        self,
        settings: EndpointSettings,
        host: str = "127.0.0.1",
        adapters: AdapterSource | None = None,
    ) -> None:
        """`adapters`: where it finds them; None: it has none."""
        self._settings = settings
        self._host = host
        self._adapters = adapters
        self._secret = secrets.token_hex(16)
        self._output: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._failure: str | None = None
        self._port: asyncio.Future[int] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None
        self._loaded_at = 0.0

    async def start(self) -> EngineAddress:
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await self._spawn()
                await self._wait_until_listening()
                self._loaded_at = time.time()
                max_model_len = await self._first_answer()
        except TimeoutError:
            await self.stop()
            raise EngineError(
                f"the engine did not answer within {self._settings.start_timeout_s:.0f} s "
                f"(start_timeout_s); its last line was: {self._last_line()}"
            ) from None
        except BaseException:
            await self.stop()
            raise
        assert self._port is not None
        return EngineAddress(self._host, self._port.result(), self._secret, max_model_len)

    async def load(self) -> Load:
        self._raise_if_dead()
        answer = await self._request("GET", PATH_LOAD, timeout=LOAD_TIMEOUT_S)
        if answer.status_code != 200:
            raise EngineError(f"the engine does not tell its load (HTTP {answer.status_code})")
        told = answer.json()
        return Load(**told | {"adapters": tuple(told["adapters"])})

    async def forget(self, adapters: Collection[str]) -> None:
        body = {"adapters": list(adapters)}
        answer = await self._request("POST", PATH_FORGET, json=body)
        if answer.status_code != 200:
            raise EngineError(f"the engine keeps deleted adapters (HTTP {answer.status_code})")

    async def check_health(self) -> None:
        self._raise_if_dead()
        answer = await self._request("GET", "/health")
        if answer.status_code != 200:
            raise EngineError(f"the engine is unhealthy (HTTP {answer.status_code}): {self.why()}")

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        assert self._reaper is not None
        _, late = await asyncio.wait([self._reaper], timeout=STOP_GRACE_S)
        if late:
            logger.warning("the engine ignored SIGTERM for %s s; killing it", STOP_GRACE_S)
            self._kill_group()
        await process.wait()
        await self._drain_output()

    def why(self) -> str:
        """One sentence on what went wrong: the engine's own words where it left any."""
        if self._failure and not any(mark in self._failure for mark in _SECONDARY):
            return self._failure
        return explain(list(self._output)) or self._failure or self._last_line()

    @property
    def loaded_at(self) -> float:
        return self._loaded_at

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def _spawn(self) -> None:
        settings = self._settings
        check_model(settings)
        spec = EngineSpec.of(settings, self._host, self._secret, self._adapters)
        self._port = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"llm_engine.engine.{settings.engine}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=engine_environment(settings),
            start_new_session=True,  # one group to kill, whatever it starts
            limit=2**20,
        )
        self._reader = asyncio.create_task(self._read_output())
        self._reaper = asyncio.create_task(self._reap())
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(spec.to_json().encode() + b"\n")
            await self._process.stdin.drain()
        except OSError:  # it is gone already, and has said why
            await self._drain_output()
            raise EngineError(self.why()) from None

    async def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line longer than the limit: dropped
                continue
            if not line:
                break
            text = line.decode(errors="replace").rstrip()
            if text.startswith(MARK):
                self._hear(json.loads(text.removeprefix(MARK)))
            elif text:
                self._output.append(text)
                logger.info("%s | %s", self._settings.name, text)

    async def _reap(self) -> None:
        """A killed engine leaves its workers behind, and they hold its memory."""
        assert self._process is not None
        # Not `wait()`: it also waits for the pipes, which the workers have inherited.
        while self._process.returncode is None:
            await asyncio.sleep(0.2)
        self._kill_group()

    def _hear(self, message: dict[str, Any]) -> None:
        if message["event"] == "listening" and self._port and not self._port.done():
            self._port.set_result(message["port"])
        elif message["event"] == "failed":
            self._failure = message["error"]

    async def _wait_until_listening(self) -> None:
        assert self._port is not None and self._process is not None
        assert self._reaper is not None
        await asyncio.wait([self._port, self._reaper], return_when=asyncio.FIRST_COMPLETED)
        if not self._port.done():
            await self._drain_output()
            raise EngineError(self.why())
        self._client = httpx.AsyncClient(
            base_url=f"http://{self._host}:{self._port.result()}",
            headers={HEADER_SECRET: self._secret},
            timeout=PROBE_TIMEOUT_S,
            trust_env=False,
        )
        while True:
            if self._process.returncode is not None:
                await self._drain_output()
                raise EngineError(self.why())
            try:
                if (await self._client.get("/health")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # it listens only once the model is loaded
            await asyncio.sleep(0.1)

    async def _first_answer(self) -> int:
        """Ready means answered: one token, or one vector. Returns max_model_len."""
        body: dict[str, Any] = {"model": self._settings.name}
        if self._settings.task == "embed":
            path, body = "/v1/embeddings", body | {"input": "ready"}
        else:
            path, body = "/v1/completions", body | {"prompt": "ready", "max_tokens": 1}
        answer = await self._request("POST", path, json=body, timeout=None)
        if answer.status_code != 200:
            raise EngineError(
                f"the engine loaded but cannot answer (HTTP {answer.status_code}): "
                f"{answer.text[:300]}"
            )
        models = (await self._request("GET", "/v1/models")).json()
        return int(models["data"][0].get("max_model_len") or 0)

    async def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        if self._client is None:
            raise EngineError("the engine is not running")
        try:
            return await self._client.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            await asyncio.sleep(0.1)  # let the exit be noticed: it says more than the socket does
            self._raise_if_dead()
            raise EngineError(
                f"the engine does not answer: {error or type(error).__name__}"
            ) from None

    def _raise_if_dead(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            raise EngineError(self._how_it_died(process.returncode if process else None))

    def _how_it_died(self, code: int | None) -> str:
        cause = explain(list(self._output)) or self._failure
        if code == -signal.SIGKILL:
            # Nobody leaves a word in that case; the usual sender is the kernel.
            return (
                "the engine process was killed (SIGKILL), as the kernel does when memory runs out"
            )
        if code is not None and code < 0:
            return f"the engine process was killed by {_signal_name(-code)}"
        return f"the engine process ended: {cause or self._last_line()}"

    async def _drain_output(self) -> None:
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=5)

    def _kill_group(self) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _last_line(self) -> str:
        return self._output[-1] if self._output else "it printed nothing"


def engine_environment(settings: EndpointSettings) -> dict[str, str]:
    """The child's environment: ours, less the gateway's secrets, plus what the endpoint sets."""
    environment = {k: v for k, v in os.environ.items() if k not in SECRETS}
    if "CUDA_VISIBLE_DEVICES" not in environment and settings.num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # Ray sets this to the replica's CPU share, 1 where that is a fraction; an engine that was
    # given no number of its own does better with its share of the machine.
    environment["OMP_NUM_THREADS"] = str(max(1, round(settings.num_cpus)))
    # Without it each start compiles vLLM's imports anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment | settings.env


def check_model(settings: EndpointSettings) -> None:
    """Catch what would otherwise fail half a minute later with a longer message."""
    model = settings.model
    looks_like_a_path = model.startswith(("/", "./", "../", "~"))
    if settings.engine != "vllm" or model.startswith("builtin:"):
        return
    if looks_like_a_path or os.path.isdir(model):
        folder = os.path.expanduser(model)
        if not os.path.isdir(folder):
            raise EngineError(
                f"there is no folder {model}. Correct `model` of endpoint '{settings.name}'; "
                "the folder must exist on the node that runs the replica."
            )
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise EngineError(
                f"{model} is not a model: it has no config.json. Point `model` of endpoint "
                f"'{settings.name}' at a folder with config.json, weights and tokenizer."
            )


def explain(output: list[str]) -> str | None:
    """The last exception in an engine's output that names a cause, as 'Type: message'."""
    found = None
    for line in output:
        match = _EXCEPTION.search(line)
        if match and not any(mark in line for mark in _SECONDARY):
            found = f"{match.group(1)}: {match.group(2)}"
    return found


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
