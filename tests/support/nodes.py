"""A Ray cluster of several nodes on one machine, started as an operator starts one.

Each node has a loopback address of its own (127.0.0.2, 127.0.0.3, ...), so that what must cross
nodes does.
"""

import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from deployments.ray_settings import find_script, serve_environment, socket_folder
from llm_engine import config
from llm_engine.serve_config import serve_config
from tests.support.cluster import eventually, free_port


class Nodes:
    KEY = "sk-cluster"

    def __init__(
        self, folder: Path, count: int = 2, head_cpus: int = 2, node_cpus: int = 2
    ) -> None:
        self._folder = folder
        self._count = count
        self._head_cpus, self._node_cpus = head_cpus, node_cpus
        self._sockets = socket_folder(folder)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.gcs = f"127.0.0.2:{free_port()}"
        self.dashboard = free_port()
        self.port = free_port()
        self.url = f"http://127.0.0.2:{self.port}"
        self.environment = {
            **os.environ,
            **serve_environment(self._sockets, metrics_port=free_port(), stats_port=free_port()),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # Serve keeps every replica 30 s for the sake of load balancers further out.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            config.ENV_KEYS: self.KEY,
            config.ENV_STORE: f"sqlite:///{folder}/store.db",
        }

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait(30)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def deploy(self, settings: dict[str, Any]) -> None:
        """`serve deploy`, with the file that `llm-engine config --serve` prints."""
        told = serve_config(config.parse(settings, {}))
        told["proxy_location"] = "HeadOnly"  # one machine has each port once
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(told))
        self.serve("deploy", str(file))

    def serve(self, *arguments: str) -> None:
        """Ray's own command line, as an operator of this cluster would run it."""
        done = subprocess.run(
            [find_script("serve") or "serve", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr

    def pid(self, node: int) -> int:
        """Of `ray start --block`; 0 is the head."""
        return self._processes[node].pid

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def get(self, path: str, **params: Any) -> httpx.Response:
        """As the usual clients do: asked again where a node took the answer with it."""

        def answer() -> httpx.Response | None:
            try:
                with self.client() as client:
                    got = client.get(path, params=params)
            except httpx.TransportError:
                return None
            return got if got.is_success else None

        return eventually(answer, 60, 0.5, f"no answer from {path}")

    def endpoints(self) -> dict[str, dict[str, Any]]:
        """By name; empty while the gateway does not answer."""
        try:
            with self.client() as client:
                answer = client.get("/v1/endpoints")
        except httpx.HTTPError:
            return {}
        return {row["id"]: row for row in answer.json()["data"]} if answer.is_success else {}

    def wait_ready(self, *names: str, timeout_s: float = 120) -> dict[str, dict[str, Any]]:
        def ready() -> bool:
            rows = self.endpoints()
            return set(rows) == set(names) and all(
                r["status"] == "READY" and r["replicas_ready"] == r["replicas_wanted"]
                for r in rows.values()
            )

        eventually(ready, timeout_s, 0.5, f"not all ready: {self.endpoints()}")
        return self.endpoints()

    def applications(self) -> dict[str, Any]:
        """The dashboard's own picture: applications, deployments, replicas."""
        return self._get("/api/serve/applications/")["applications"]

    def nodes(self) -> list[dict[str, Any]]:
        answer = self._get("/nodes?view=summary")
        return [n for n in answer["data"]["summary"] if n["raylet"].get("state") == "ALIVE"]

    def _get(self, path: str) -> Any:
        token = self.environment["RAY_AUTH_TOKEN"]
        answer = httpx.get(
            self.environment["RAY_DASHBOARD_ADDRESS"] + path,
            headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=30,
        )  # fmt: skip
        return answer.raise_for_status().json()

    def _dashboard_answers(self) -> bool:
        try:
            return bool(self._get("/api/version"))
        except httpx.HTTPError:
            return False

    def _start_all(self) -> None:
        host, port = self.gcs.split(":")
        self._start(
            "--head", f"--node-ip-address={host}", f"--port={port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--temp-dir={self._sockets / 'ray'}",
        )  # fmt: skip
        eventually(self._dashboard_answers, 60, what="the head node did not start")
        # One after the other: on one machine they would take each other's raylet for their own.
        for _ in range(1, self._count):
            self.join()

    def join(self) -> None:
        """One more node."""
        there, number = len(self.nodes()), len(self._processes)
        for _ in range(3):  # Ray gives a node 30 s, which a busy machine may not
            self._start(f"--address={self.gcs}", f"--node-ip-address=127.0.0.{2 + number}")
            node = self._processes[-1]
            eventually(
                lambda node=node: len(self.nodes()) > there or node.poll() is not None, 90, 0.5
            )
            if node.poll() is None:
                return
            self._processes.pop()
        raise AssertionError("a node did not join")

    def _start(self, *arguments: str) -> None:
        command = [
            find_script("ray") or "ray", "start", "--block", "--disable-usage-stats",
            f"--num-cpus={self._node_cpus if self._processes else self._head_cpus}",
            "--object-store-memory=80000000",
            f"--dashboard-agent-listen-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0", *arguments,
        ]  # fmt: skip
        log = (self._folder / f"node{len(self._processes)}.log").open("wb")
        with log:
            self._processes.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )
