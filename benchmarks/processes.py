"""CPU time of all processes of a target, by role. A target's processes carry its mark.

The mark is an environment variable: it survives new sessions, daemons and Ray's workers.
"""

import asyncio
import signal
import time
from collections import defaultdict

import psutil

MARK = "LLM_ENGINE_BENCHMARK_TARGET"

#: Role by what its command line holds; the first that fits.
_ROLES = (
    ("engine", ("llm_engine.engine.", "VLLM::", "vllm.entrypoints")),
    ("ingress", ("ServeReplica:llm-engine:Ingress", "OpenAiIngress")),
    ("proxy", ("haproxy", "ProxyActor", "HAProxyManager")),
    ("engine replica", ("EngineReplica", "LLMServer")),
    ("router", ("ServeReplica:llm-engine:ModelRouter",)),
    ("controller", ("ServeReplica:llm-engine:Controller",)),
    ("serve controller", ("ServeController",)),
    ("gcs", ("gcs_server",)),
    ("dashboard", ("dashboard.py", "dashboard-", "dashboard/agent.py", "runtime_env/agent")),
    ("raylet", ("raylet/raylet",)),
)


class Clock:
    """Reads the CPU seconds that the processes with one mark have used so far."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._pids: dict[int, float] = {}  # every process found so far: pid -> when created
        self._gone: dict[str, float] = defaultdict(float)
        self._last: dict[tuple[int, float], tuple[str, float]] = {}

    def read(self) -> dict[str, float]:
        """CPU seconds by role. What a process had used when last seen stays in the sum."""
        seen: dict[tuple[int, float], tuple[str, float]] = {}
        for process in self.processes():
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    used = times.user + times.system
                    seen[(process.pid, process.create_time())] = (role_of(process), used)
            except psutil.Error:
                continue
        for key, (role, used) in self._last.items():
            if key not in seen:
                self._gone[role] += used
        self._last = seen
        total = defaultdict(float, self._gone)
        for role, used in seen.values():
            total[role] += used
        return dict(total)

    def processes(self) -> list[psutil.Process]:
        """Those with the mark, and their descendants: a process that sets its title, as vLLM's
        and Ray's workers do, may overwrite the environment that others see."""
        found = []
        for process in psutil.process_iter():  # by pid, so a parent comes before its child
            try:
                if self._ours(process):
                    self._pids[process.pid] = process.create_time()
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _ours(self, process: psutil.Process) -> bool:
        if self._pids.get(process.pid) == process.create_time():
            return True
        if process.ppid() in self._pids:
            return True
        return process.environ().get(MARK) == self._mark

    def memory(self) -> int:
        """Bytes, each shared page counted in part (PSS)."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    async def end_all(self, grace_s: float = 10) -> None:
        """End what is left of the target: SIGTERM, then SIGKILL."""
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5)):
            for process in self.processes():
                try:
                    process.send_signal(number)
                except psutil.Error:
                    continue
            end = time.monotonic() + wait_s
            while self.processes() and time.monotonic() < end:
                await asyncio.sleep(0.1)


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for role, parts in _ROLES:
        if any(part in line for part in parts):
            return role
    # A child of the engine that has not named itself yet.
    return "engine" if "multiprocessing.spawn" in line else "other"


def used_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {role: after[role] - before.get(role, 0.0) for role in after}
