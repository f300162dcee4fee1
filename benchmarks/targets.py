"""What is measured: servers of OpenAI's API over the same engine with the same arguments."""

import asyncio
import json
import os
import secrets
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import MARK, Clock
from llm_engine.config import EndpointSettings
from llm_engine.engine import vllm
from llm_engine.engine.base import HEADER_SECRET
from llm_engine.engine.process import EngineProcess, engine_environment
from llm_engine.engine.server import EngineSpec

HOST = "127.0.0.1"
START_TIMEOUT_S = 300
#: For a folder of weights; the built-in model brings the same first two along.
FOLDER_ARGS = {"max_model_len": 2048, "max_num_seqs": 64, "kv_cache_memory_bytes": 512 * 2**20}


class TargetError(Exception):
    """A target that did not start."""


class Target(ABC):
    """One server under test; `stop` leaves none of its processes."""

    def __init__(self, name: str, endpoint: EndpointSettings, port: int, folder: Path) -> None:
        self.name = name
        self.port = port
        self.headers: dict[str, str] = {}
        self._mark = secrets.token_hex(8)
        self.clock = Clock(self._mark)
        self._endpoint = endpoint.model_copy(update={"env": endpoint.env | {MARK: self._mark}})
        self._log = folder / f"{name.replace(' ', '-')}.log"

    @abstractmethod
    async def start(self) -> None:
        """Returns when it answers. Raises TargetError."""

    async def stop(self) -> None:
        await self.clock.end_all()

    async def _run(self, *command: str, env: dict[str, str]) -> asyncio.subprocess.Process:
        """A child with its output in the target's log and the target's mark upon it."""
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command, env=env | {MARK: self._mark}, start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    async def _wait_until_it_answers(
        self, process: asyncio.subprocess.Process, path: str = "/health"
    ) -> None:
        url = f"http://{HOST}:{self.port}{path}"
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(START_TIMEOUT_S * 5):
                if process.returncode is not None:
                    break
                try:
                    if (await client.get(url)).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.2)
        raise TargetError(f"{self.name} did not start: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


class BareVLLM(Target):
    """vLLM's own OpenAI server, with the arguments and the environment that our engine gets."""

    async def start(self) -> None:
        args = [f"--host={HOST}", f"--port={self.port}", *command_line(self._endpoint)]
        command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", *args)
        process = await self._run(*command, env=vllm_environment(self._endpoint))
        await self._wait_until_it_answers(process)


class BareFake(Target):
    """The fake engine's server, reached without a gateway."""

    async def start(self) -> None:
        self._engine = EngineProcess(self._endpoint)
        address = await self._engine.start()
        self.port = address.port
        self.headers = {HEADER_SECRET: address.secret}

    async def stop(self) -> None:
        await self._engine.stop()


class LLMEngine(Target):
    """This system, as `llm-engine up` runs it; from another checkout where `checkout` says so."""

    def __init__(
        self, *args: Any, dashboard_port: int, state_dir: Path, checkout: Path | None = None
    ) -> None:
        super().__init__(*args)
        self._checkout = checkout
        # Only what is not a default: another checkout may not know every setting.
        self._settings = {
            "gateway": {"host": HOST, "port": self.port},
            "endpoints": [self._endpoint.model_dump(mode="json", exclude_defaults=True)],
            "cluster": {
                "state_dir": str(state_dir), "ray_port": 0, "dashboard_port": dashboard_port,
            },
        }  # fmt: skip

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "deployments.local",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**20,
            env=self._environment(), cwd=self._checkout, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._until_settled()
        except TimeoutError:
            raise TargetError(f"{self.name} did not start in {START_TIMEOUT_S} s") from None

    def _environment(self) -> dict[str, str]:
        environment = clean_environment() | {MARK: self._mark}
        if self._checkout is not None:  # goes before the installed one, in Ray's workers too
            environment["PYTHONPATH"] = str(self._checkout)
        return environment

    async def _until_settled(self) -> None:
        assert self._process.stdout is not None
        reason = None
        async for line in self._process.stdout:
            told = json.loads(line)
            reason = told.get("reason") or told.get("error") or reason
            if told["event"] == "settled" and told["ready"]:
                return
            if told["event"] in ("settled", "failed"):
                break
        raise TargetError(f"{self.name} did not start: {reason}")

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 40)
            except TimeoutError:
                pass
        await super().stop()


class RayServeLLM(Target):
    """ray.serve.llm's OpenAI application on a Ray of its own, with Ray's defaults.

    Without a GPU it insists on vLLM's executor "mp", one process more than the others have:
    --vllm-args '{"distributed_executor_backend": "mp"}' gives it to all.
    """

    def __init__(self, *args: Any, dashboard_port: int, state_dir: Path, direct: bool) -> None:
        super().__init__(*args)
        self._dashboard_port, self._state_dir = dashboard_port, state_dir
        self._direct = direct

    async def start(self) -> None:
        wanted = {
            "host": HOST,
            "port": self.port,
            "name": self._endpoint.name,
            "model": spec_of(self._endpoint).model,
            "vllm_args": engine_args(self._endpoint),
        }
        env = vllm_environment(self._endpoint) | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self._state_dir / "admin.sock"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self._state_dir / "haproxy.cfg"),
        }
        if self._direct:
            env["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] = "1"
            env["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        module = "benchmarks.ray_serve_llm"
        options = (str(self._dashboard_port), str(self._state_dir))
        process = await self._run(sys.executable, "-m", module, *options, env=env)
        assert process.stdin is not None
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        await self._wait_until_it_answers(process, "/v1/models")


def spec_of(endpoint: EndpointSettings) -> EngineSpec:
    """What EngineProcess would tell an engine process."""
    return EngineSpec.of(endpoint, HOST)


def engine_args(endpoint: EndpointSettings) -> dict[str, Any]:
    """The arguments our engine runs with, less the guard that asks for our secret."""
    args = vllm.effective_args(spec_of(endpoint), on_cpu())
    return {name: value for name, value in args.items() if name != "middleware"}


def command_line(endpoint: EndpointSettings) -> list[str]:
    return vllm.to_command_line(engine_args(endpoint))


def vllm_environment(endpoint: EndpointSettings) -> dict[str, str]:
    """What our engine process sets for itself before it imports vLLM."""
    extra = dict(vllm.ALWAYS_ENV) | (vllm.CPU_ENV if on_cpu() else {})
    if os.path.isdir(spec_of(endpoint).model):
        extra["HF_HUB_OFFLINE"] = "1"
    environment = engine_environment(endpoint)
    return extra | environment


def clean_environment() -> dict[str, str]:
    """Ours, less what would change the settings under test."""
    return {k: v for k, v in os.environ.items() if not k.startswith("LLM_ENGINE_")}


def on_cpu() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not Path("/dev/nvidiactl").exists()
