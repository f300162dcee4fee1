"""The environment that Ray's processes need before they start, in one place.

`llm-engine up` gives it to the Ray it starts; for any other cluster `python -m
deployments.ray_settings` prints it, as cluster.yaml does in front of `ray start`.
"""

import hashlib
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

from llm_engine.errors import StartupError

#: HAProxy takes socket paths of at most 97 characters, and Serve puts a folder named by the
#: 56-digit node id into them: what is left does not fit under an ordinary home.
_LONGEST_SOCKET_FOLDER = 97 - len("/") - 56 - len("/metrics.sock")
#: Ray's own sockets lie some 70 characters below its temporary folder.
_LONGEST_RAY_FOLDER = 36


def serve_environment(sockets: Path, *, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Ray Serve with HAProxy in front and user code in the replica's main loop.

    Measured on two cores: Serve's Python proxy takes 2-4 ms of CPU a request, HAProxy 0.4 ms.
    """
    assert len(str(sockets)) <= _LONGEST_SOCKET_FOLDER, sockets
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # Of every request a line to a Python process that counts it: the gateway counts itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(sockets / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(sockets),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(sockets / "server-state"),
        # A hop between threads a request, a log line a request: not on the token path.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    binary = find_script("llm-engine-haproxy")
    if binary is not None:
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = binary
    return environment


def find_script(name: str) -> str | None:
    """A command of this installation."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def socket_folder(state_dir: Path) -> Path:
    """A folder for unix sockets that belongs to `state_dir` and has a short name; only ours.

    HAProxy's admin socket is open to whoever can reach it, so the folder must be private. Raises
    StartupError where somebody else has taken the name.
    """
    name = hashlib.sha256(str(state_dir).encode()).hexdigest()[:8]
    folder = Path("/tmp") / f"le-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise StartupError(f"{folder} belongs to another user. Remove it, or change state_dir.")
    folder.chmod(0o700)
    return folder


def ray_folder(state_dir: Path) -> Path:
    """Ray's temporary folder: under `state_dir`, unless its sockets would not fit there."""
    folder = state_dir / "ray"
    if len(str(folder)) <= _LONGEST_RAY_FOLDER:
        return folder
    return socket_folder(state_dir) / "ray"


def main() -> None:
    """Print it for a node's shell: eval "$(python -m deployments.ray_settings)" && ray start ..."""
    sockets = socket_folder(Path("~/.llm-engine").expanduser())
    environment = serve_environment(sockets, metrics_port=9101, stats_port=8404)
    for name, value in ({"RAY_AUTH_MODE": "token"} | environment).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
