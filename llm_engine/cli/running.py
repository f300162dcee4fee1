"""The `up` of a state folder: is there one, who holds its lock, what has it started.

Reads <state_dir>/up.json, which the platform writes once it answers, and up.lock, which lives as
long as the platform does.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_engine.errors import StartupError

#: Every process of an `up` carries it in its environment, with the state folder as its value:
#: how `down` finds what a killed `up` has left behind.
ENV_MARK = "LLM_ENGINE_UP"


@dataclass(frozen=True, slots=True)
class Running:
    """What the `up` of a state folder says of itself."""

    pid: int
    address: str | None = None  # None while it is still starting
    dashboard: str | None = None
    ray: str | None = None


def find_running(state_dir: Path) -> Running | None:
    """The `up` that lives in a state folder, from its up.json or, while it starts, its lock."""
    told = read_state(state_dir)
    if told is not None and is_local(told.pid):
        return told
    pid = _lock_holder(state_dir)
    return Running(pid) if pid is not None else None


def read_state(state_dir: Path) -> Running | None:
    """What up.json says, whether or not it is still true."""
    try:
        told: Any = json.loads((state_dir / "up.json").read_text())
        return Running(int(told["pid"]), told["address"], told["dashboard"], told.get("ray"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ray_environment(running: Running, state_dir: Path) -> dict[str, str]:
    """What `ray`, `ray job` and `serve` read; each of them reads another name."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state_dir / "ray-token"),
        "RAY_ADDRESS": running.ray or "",
        # Without it Ray takes 127.0.0.1 to mean the address that other machines can reach.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_API_SERVER_ADDRESS": running.dashboard or "",
        "RAY_DASHBOARD_ADDRESS": running.dashboard or "",
    }


@contextmanager
def only_one(state_dir: Path) -> Iterator[int]:
    """The right to run an `up` in a state folder; a lock that dies with its last holder.

    Yields a file descriptor: children that inherit it hold the lock too.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(state_dir / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartupError(
            f"cannot write to {state_dir} ({error.strerror}); set cluster.state_dir to a folder "
            "that can be written."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StartupError(
            f"an llm-engine is already starting or running in {state_dir}. "
            "`llm-engine status` shows it, `llm-engine down` stops it."
        ) from None
    try:
        yield lock
    finally:
        os.close(lock)


def write_lock_holder(lock: int, pid: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(pid).encode(), 0)


def _lock_holder(state_dir: Path) -> int | None:
    try:
        lock = os.open(state_dir / "up.lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(lock, 20, 0).decode()
        return int(text) if text.isdigit() and is_local(int(text)) else None
    finally:
        os.close(lock)
    return None


def is_local(pid: int) -> bool:
    """Whether a live process is a `python -m deployments.local`: pids are reused."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"deployments.local" in words


def marked(state_dir: Path) -> list[int]:
    """Every live process that an `up` of this state folder has started, but for this one."""
    return carrying(f"{ENV_MARK}={state_dir}")


def carrying(variable: str) -> list[int]:
    """Every live process with this NAME=value in its environment, but for this one."""
    mark = variable.encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def sweep(folder: Path, grace_s: float = 0) -> int:
    """Kill what is left of an `up` whose leader is gone; returns how many it had to."""
    end = time.monotonic() + grace_s
    while marked(folder) and time.monotonic() < end:
        time.sleep(0.1)
    killed: set[int] = set()
    for _ in range(20):  # a process may start another while it is being looked for
        left = marked(folder)
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.1)
    return len(killed)
