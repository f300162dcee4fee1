"""The environment that Ray's processes need before they start, in one place.

`llm-engine up` gives it to the Ray it starts; for any other cluster `llm-engine ray-env` prints
it, and cluster.yaml puts it in front of `ray start`.
"""

import os
import shutil
import sys
from pathlib import Path

#: Longest unix socket path; HAProxy's lies in a folder named by a 56-digit node id.
_LONGEST_SOCKET_PATH = 107


def serve_environment(folder: Path, *, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Ray Serve with HAProxy in front and user code in the replica's main loop.

    Measured on two cores: Serve's Python proxy takes 2-4 ms of CPU a request, HAProxy 0.4 ms.
    """
    haproxy = folder / "haproxy"
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
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


def short_enough(folder: Path) -> bool:
    """Whether HAProxy's sockets can lie under `folder`."""
    deepest = folder / "haproxy" / ("0" * 56) / "metrics.sock"
    return len(str(deepest)) <= _LONGEST_SOCKET_PATH
