"""The whole system, started the way `llm-engine up` does and stopped by its own means."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import psutil
from openai import AsyncOpenAI, OpenAI

from llm_engine import config

START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(
    condition: Callable[[], Any], timeout_s: float = 30, every_s: float = 0.1, what: str = ""
) -> Any:
    """The first true value of `condition`; an assertion error with `what` after the timeout."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what or f"still {value!r} after {timeout_s} s"
        time.sleep(every_s)


class Cluster:
    """`with Cluster(settings) as cluster:` then `cluster.client()`, `cluster.openai()`."""

    KEY = "sk-test-key"

    def __init__(self, settings: dict[str, Any], wait: bool = True) -> None:
        self.settings = config.parse(settings, {})
        self.events: list[dict[str, Any]] = []
        self._raw = settings
        self._wait = wait
        self._clients: list[OpenAI] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deployments.local"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._raw) + "\n")
        self._process.stdin.flush()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            if self._wait:
                self.wait_for("settled", START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        for client in self._clients:
            client.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(STOP_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def kill(self) -> None:
        """Everything at once and without a word, as when the power goes."""
        assert self._process is not None
        doomed = [*self.processes(), psutil.Process(self._process.pid)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, 10)

    def replica_pids(self, deployment: str) -> list[int]:
        """Of a deployment of the gateway."""
        title = f"ray::ServeReplica:llm-engine:{deployment}"
        return [p.pid for p in self.processes() if " ".join(command(p)).startswith(title)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.gateway.port}"

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.KEY}"}
        defaults = {"base_url": self.url, "headers": headers, "timeout": 60, "trust_env": False}
        return httpx.Client(**{**defaults, **options})

    def openai(self, **options: Any) -> OpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": self.KEY, "max_retries": 0}
        client = OpenAI(**{**defaults, **options})
        self._clients.append(client)
        return client

    def async_openai(self, **options: Any) -> AsyncOpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": self.KEY, "max_retries": 0}
        return AsyncOpenAI(**{**defaults, **options})

    def endpoint(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            return client.get(f"/v1/endpoints/{name}").raise_for_status().json()

    def wait_until(self, name: str, state: str, timeout_s: float = 120) -> dict[str, Any]:
        """The endpoint's status once its last operation has ended in `state`."""

        def there() -> dict[str, Any] | None:
            try:
                row = self.endpoint(name)
            except httpx.HTTPError:  # the gateway may be what was killed
                return None
            return row if row["status"] == state and row["settled"] else None

        return eventually(there, timeout_s, 0.2, f"{name} is not {state}")

    def load(self, name: str) -> int:
        """Requests running and waiting in all engines of an endpoint, as the router knows."""
        loads = [r["load"] for r in self.endpoint(name)["replicas"]]
        return sum(load["running"] + load["waiting"] for load in loads)

    def processes(self) -> list[psutil.Process]:
        """Every live process of this instance, found by the mark in its environment."""
        assert self._process is not None
        mark = self._instance()
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LLM_ENGINE_INSTANCE") == mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def engines(self, endpoint: str) -> list[psutil.Process]:
        """The HTTP processes of an endpoint's vLLM engines, found by their private ports."""
        ports = {r["port"] for r in self.endpoint(endpoint)["replicas"] if r["state"] == "READY"}
        return [
            process
            for process in self.processes()
            if command(process)[1:3] == ["-m", "llm_engine.engine.vllm"]
            and {c.laddr.port for c in process.net_connections() if c.status == "LISTEN"} & ports
        ]

    def wait_for(self, event: str, timeout_s: float) -> dict[str, Any]:
        def seen() -> dict[str, Any] | None:
            for each in list(self.events):
                assert each["event"] != "failed" or event == "failed", each
                if each["event"] == event:
                    return each
            assert self._process is not None and self._process.poll() is None, self.events
            return None

        return eventually(seen, timeout_s, what=f"no '{event}' within {timeout_s} s")

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def _instance(self) -> str:
        assert self._process is not None
        child = next(p for p in psutil.Process(self._process.pid).children() if _has_mark(p))
        return child.environ()["LLM_ENGINE_INSTANCE"]


def command(process: psutil.Process) -> list[str]:
    """Its command line; nothing where it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _has_mark(process: psutil.Process) -> bool:
    try:
        return "LLM_ENGINE_INSTANCE" in process.environ()
    except psutil.Error:
        return False
