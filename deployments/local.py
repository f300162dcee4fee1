"""`llm-engine up`: a Ray of its own on this machine, the gateway on it, and an orderly end.

Run as `python -m deployments.local` by the command line, which shows what this prints: one JSON
object a line, {"event": ..., ...}. Ends on SIGTERM, SIGINT, or when stdin closes.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from deployments.ray_settings import find_script, ray_folder, serve_environment, socket_folder
from llm_engine import config
from llm_engine.addresses import cannot_listen, local_url
from llm_engine.cli.running import carrying
from llm_engine.config import ENV_SECRET, ENV_STORE, ClusterSettings, Settings
from llm_engine.errors import LLMEngineError, StartupError
from llm_engine.serve_config import has_password

RAY_START_TIMEOUT_S = 90
GATEWAY_TIMEOUT_S = 120
RAY_STOP_TIMEOUT_S = 20
#: Every process of one `up` carries it in its environment: what the end must not leave behind.
INSTANCE = "LLM_ENGINE_INSTANCE"
#: Endpoint states that will not change without someone doing something.
SETTLED = ("READY", "UPDATE_FAILED")
#: Logical CPUs of the smallest machine: what the demo models, a fine-tune and a batch's own engine
#: reserve must fit at a time.
LEAST_CPUS = 4


def tell(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


class RayLost(StartupError):
    """Ray has ended, or does not come up."""


class LocalCluster:
    """One Ray head node with every port on loopback, as child processes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cluster: ClusterSettings = settings.cluster
        self._process: subprocess.Popen[bytes] | None = None
        self._instance = secrets.token_hex(8)
        self.folder = self._cluster.state_dir
        self.ray_port = self._cluster.ray_port or free_port()
        self.dashboard = f"http://127.0.0.1:{self._cluster.dashboard_port}"
        self.environment = self._environment()

    def _environment(self) -> dict[str, str]:
        """For Ray's processes, and for whoever talks to them."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= serve_environment(
            socket_folder(self.folder), metrics_port=free_port(), stats_port=free_port()
        )
        environment |= ray_auth(self.folder)
        environment |= secrets_for_jobs(self._settings)
        environment[INSTANCE] = self._instance
        # Named for other systems, but what it does is to make 127.0.0.1 the node's address;
        # otherwise Ray replaces it by one that other machines can reach.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Serve keeps an ingress for this long after its last request; locally there is nobody
        # further out who might still know its port.
        environment.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # engines drain by themselves
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # workers would compile everything anew
        return environment

    def check_ports(self) -> None:
        """Raises StartupError where something, an earlier llm-engine perhaps, has one of them."""
        check_port(self._settings.gateway.host, self._settings.gateway.port, "gateway.port")
        check_port("127.0.0.1", self._cluster.dashboard_port, "cluster.dashboard_port")
        check_port("127.0.0.1", self.ray_port, "cluster.ray_port")

    def start(self, stop: threading.Event) -> None:
        """Raises StartupError with what to do. Returns early once `stop` is set."""
        environment = self.environment
        cpus = self._cluster.num_cpus or max(LEAST_CPUS, os.cpu_count() or 1)
        command = [
            find_script("ray") or "ray", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={self.ray_port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._cluster.dashboard_port}",
            # Two Rays on a host that share the default agent port break each other's jobs.
            f"--dashboard-agent-listen-port={self._cluster.dashboard_agent_port or free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            f"--runtime-env-agent-port={free_port()}",
            "--min-worker-port=0",  # the system picks: two Rays on a host share the default range
            "--max-worker-port=0",
            f"--num-cpus={cpus}",
            f"--object-store-memory={self._cluster.object_store_bytes}",
            f"--temp-dir={ray_folder(self.folder)}",
            "--disable-usage-stats",
            "--log-color=false",  # it ends in a file
        ]  # fmt: skip
        log = (self.folder / "ray.log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        self._wait_for_dashboard(stop)

    def stop(self) -> None:
        """End Ray and all that ran on it; nothing of this instance is left."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(RAY_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
        mine = f"{INSTANCE}={self._instance}"
        for pid in carrying(mine):
            kill(pid, signal.SIGTERM)
        wait_until(lambda: not carrying(mine), 5)
        for pid in carrying(mine):
            kill(pid, signal.SIGKILL)
        shutil.rmtree(socket_folder(self.folder), ignore_errors=True)

    def check_alive(self) -> None:
        """Raises RayLost once Ray has ended by itself."""
        if self._process is None or self._process.poll() is not None:
            raise RayLost(f"Ray has ended: {self._last_words()}")

    def check_answers(self) -> None:
        """As `check_alive`, and where its control store is gone."""
        self.check_alive()
        if not self._dashboard_says_yes("/api/gcs_healthz"):
            raise RayLost(f"Ray does not answer any more (see {self.folder / 'ray.log'}).")

    def _wait_for_dashboard(self, stop: threading.Event) -> None:
        def up() -> bool:
            self.check_alive()
            return stop.is_set() or self._dashboard_says_yes("/api/version")

        if not wait_until(up, RAY_START_TIMEOUT_S):
            raise RayLost(
                f"Ray's dashboard did not answer within {RAY_START_TIMEOUT_S} s. "
                f"See {self.folder / 'ray.log'}."
            )

    def _dashboard_says_yes(self, path: str) -> bool:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        headers = {"Authorization": f"Bearer {token}"}
        try:
            answer = httpx.get(self.dashboard + path, headers=headers, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def _last_words(self) -> str:
        lines = (self.folder / "ray.log").read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it printed nothing'} (see {self.folder / 'ray.log'})"


def ray_auth(folder: Path) -> dict[str, str]:
    """Ray's dashboard and job API run code for whoever asks: they ask for a token of ours."""
    path = folder / "ray-token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def secrets_for_jobs(settings: Settings) -> dict[str, str]:
    """What the configuration holds and a job's settings must not: Ray shows those to operators."""
    secret, url = settings.store.secret_key, settings.store.url
    told = {
        ENV_SECRET: secret.get_secret_value() if secret is not None else None,
        ENV_STORE: url if url is not None and has_password(url) else None,
    }
    return {name: value for name, value in told.items() if value}


def deploy(settings: Settings, cluster: LocalCluster, stop: threading.Event) -> None:
    """Put the gateway on the Ray that `cluster` started; returns when it answers, or at `stop`."""
    log = settings.cluster.state_dir / "deploy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.deploy", f"127.0.0.1:{cluster.ray_port}"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=cluster.environment,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(config.dump(settings, reveal=True)).encode() + b"\n")

    def over() -> bool:
        cluster.check_alive()
        return process.poll() is not None or stop.is_set()

    try:
        ended = wait_until(over, GATEWAY_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    if not ended:
        raise StartupError(f"the gateway did not answer within {GATEWAY_TIMEOUT_S} s (see {log})")
    if process.returncode != 0 and not stop.is_set():
        cluster.check_answers()
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise StartupError(f"the gateway did not start: {lines[-1]} (see {log})")


def gateway_client(settings: Settings) -> httpx.Client:
    gateway = settings.gateway
    key = next((k.get_secret_value() for k in gateway.api_keys), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = local_url(gateway.host, gateway.port)
    return httpx.Client(base_url=url, headers=headers, timeout=5, trust_env=False)


def watch_endpoints(settings: Settings, cluster: LocalCluster, stop: threading.Event) -> None:
    """Tell every change of an endpoint's state, and once that all have settled."""
    told: dict[str, tuple[str, str | None]] = {}
    declared = {endpoint.name for endpoint in settings.endpoints}
    settled = not declared
    with gateway_client(settings) as client:
        while not stop.wait(1.0 if settled else 0.3):
            cluster.check_alive()
            try:
                rows = client.get("/v1/endpoints").raise_for_status().json()["data"]
            except httpx.HTTPError:
                continue
            for row in rows:
                now = (row["status"], row["status_reason"])
                if told.get(row["id"]) != now:
                    told[row["id"]] = now
                    tell("endpoint", name=row["id"], status=now[0], reason=now[1])
            # Those that clients have made come back too, but nobody waits for them here.
            awaited = [row for row in rows if row["id"] in declared]
            done = len(awaited) == len(declared) and all(r["status"] in SETTLED for r in awaited)
            if done and not settled:
                settled = True
                tell("settled", ready=[r["id"] for r in rows if r["status"] == "READY"])


def start(settings: Settings, stop: threading.Event) -> LocalCluster:
    """Ray and the gateway. Nothing is left of them where it raises."""
    cluster = LocalCluster(settings)
    cluster.check_ports()  # before there is anything to clean up: it might be another's
    try:
        tell("step", name="Ray")
        cluster.start(stop)
        tell("step", name="gateway", dashboard=cluster.dashboard)
        deploy(settings, cluster, stop)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def start_patiently(settings: Settings, stop: threading.Event) -> LocalCluster:
    """Once more where Ray was lost: it gives itself 30 s to come up, too few on a machine that is
    busy, and its ports are known to be free only until it opens them."""
    try:
        return start(settings, stop)
    except RayLost as error:
        tell("again", reason=str(error))
        return start(settings, stop)


def run(settings: Settings, stop: threading.Event) -> None:
    cluster = start_patiently(settings, stop)
    try:
        if stop.is_set():
            return
        with gateway_client(settings) as client:
            url = str(client.base_url)
        (cluster.folder / "up.json").write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "address": url,
                    "dashboard": cluster.dashboard,
                    "ray": f"127.0.0.1:{cluster.ray_port}",
                }
            )
        )
        tell("step", name="models", address=url)
        watch_endpoints(settings, cluster, stop)
    finally:
        (cluster.folder / "up.json").unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError):
            tell("stopping")
        cluster.stop()
        tell("stopped")


def main() -> None:
    """Settings come as one line of JSON on stdin, which then stays open; see the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stay", action="store_true", help="go on when stdin closes")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    line = sys.stdin.readline()
    if not options.stay:
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    try:
        settings = config.parse(json.loads(line), dict(os.environ))
        settings.check_exposure()
        run(settings, stop)
    except LLMEngineError as error:
        tell("failed", error=str(error))
        sys.exit(1)
    except Exception as error:
        tell("failed", error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int, setting: str) -> None:
    problem = cannot_listen(host, port)
    if problem:
        raise StartupError(
            f"port {port} on {host} cannot be opened ({problem}). Stop what uses it "
            f"(`llm-engine down`, if that is an earlier llm-engine), or set {setting} to "
            "another one."
        )


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


if __name__ == "__main__":
    main()
