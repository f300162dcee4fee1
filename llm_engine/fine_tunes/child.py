"""The trainer's process: told one line of JSON, it tells lines of JSON, until it is done or dead.

It trains in a process of its own, so that whatever takes it down (memory, a driver, a library) is
one thing more that a fine-tune survives.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llm_engine.config import SECRETS
from llm_engine.errors import LLMEngineError

TRAINER = (sys.executable, "-m", "llm_engine.fine_tunes.trainer")
#: A trainer that tells nothing for so long hangs.
SILENT_S = 3600.0
#: What it gets to keep a last checkpoint.
STOP_S = 120.0
_LONGEST_LINE = 2**20
_TAIL = 8192  # bytes of what it has said last
_NO_MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory", re.I)
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception)\b")


class TrainerDied(LLMEngineError):
    """It ended without an end; the text says how. `code`: for the record, should it be the last."""

    def __init__(self, message: str, code: str = "trainer_failed") -> None:
        super().__init__(message)
        self.code = code


class Trainer:
    """`async with Trainer(...) as trainer: async for event in trainer.events(): ...`"""

    def __init__(
        self,
        spec: dict[str, Any],
        say: Callable[[str], None],
        command: Sequence[str] = TRAINER,
        cpus: float = 1,
    ) -> None:
        """`say`: for what it prints that is no event."""
        self._spec = spec
        self._say = say
        self._command = command
        self._cpus = cpus
        self._tail = b""
        self._stop_by: float | None = None
        self._process: asyncio.subprocess.Process
        self._exited: asyncio.Task[int]
        self._listening: asyncio.Task[None]

    async def __aenter__(self) -> "Trainer":
        environment = {k: v for k, v in os.environ.items() if k not in SECRETS}
        # As many threads as CPUs were reserved, always the same: sums come out the same, too.
        threads = str(max(1, int(self._cpus)))
        environment = {"OMP_NUM_THREADS": threads, "MKL_DYNAMIC": "FALSE"} | environment
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=_LONGEST_LINE,
            start_new_session=True,  # its own children die with it; signals to us are ours
        )
        self._exited = asyncio.create_task(self._process.wait())
        self._listening = asyncio.create_task(self._listen())
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it is dead; `events` tells
            self._process.stdin.write(json.dumps(self._spec).encode() + b"\n")
            await self._process.stdin.drain()  # and stays open: at its end the trainer dies
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing of it is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._exited
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):  # both pipes end with those who held them
                await self._process.stdout.read()
                await self._listening
        self._listening.cancel()

    def stop(self) -> None:
        """It keeps a checkpoint and ends with `stopped`; without one, where it cannot in time."""
        if self._stop_by is None:
            self._stop_by = time.monotonic() + STOP_S
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The last one is `done`, `stopped` or `failed`. Raises TrainerDied."""
        assert self._process.stdout is not None
        while line := await self._line():
            event = _parse(line)
            if event is None:
                self._say(line.decode(errors="replace").rstrip())
                continue
            yield event
            if event["event"] in ("done", "stopped", "failed"):
                return
        if self._stop_by is not None:
            yield {"event": "stopped", "step": None, "path": None}
            return
        raise await self._how_it_died()

    async def _line(self) -> bytes:
        """Empty at its end, which is not always that of the pipe: its own children hold it, too."""
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(self._process.stdout.readline())
        silent_by = time.monotonic() + SILENT_S
        try:
            while not reading.done():
                dead = self._exited.done()
                await asyncio.wait([reading], timeout=1.0)
                if reading.done():
                    break
                if dead or time.monotonic() > (self._stop_by or math.inf):
                    return b""
                if time.monotonic() > silent_by:
                    raise TrainerDied(f"it told nothing for {SILENT_S:.0f} s")
            return reading.result()
        except ValueError:  # longer than the limit
            raise TrainerDied("it told a line without an end") from None
        finally:
            reading.cancel()

    async def _listen(self) -> None:
        """Passes on what it says to people, and remembers the end of it."""
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            self._tail = (self._tail + chunk)[-_TAIL:]
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()

    async def _how_it_died(self) -> TrainerDied:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._exited), 10)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._listening), 2)
        code = self._process.returncode
        said = self._tail.decode(errors="replace")
        if _NO_MEMORY.search(said):
            return TrainerDied(
                "it ran out of memory; a smaller batch_size or shorter examples need less",
                "out_of_memory",
            )
        if code == -signal.SIGKILL:
            return TrainerDied(
                "it was killed (SIGKILL), which is what happens when memory runs out"
            )
        words = _last_words(said)
        last = f": {words[:300]}" if words else ""
        if code is not None and code < 0:
            return TrainerDied(f"it was ended by {signal.Signals(-code).name}{last}")
        return TrainerDied(f"it ended with exit code {code}{last}")


def _last_words(said: str) -> str:
    """The exception that ended it, or else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines or [""])[-1]


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        told = json.loads(line)
    except ValueError:
        return None
    return _finite(told) if isinstance(told.get("event"), str) else None


def _finite(told: dict[str, Any]) -> dict[str, Any]:
    """Without what no JSON can hold: a loss may be NaN."""
    return {
        key: _finite(value) if isinstance(value, dict) else value
        for key, value in told.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
