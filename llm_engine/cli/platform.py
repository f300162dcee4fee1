"""The platform as a child process of `up`: its events, its end, and who decides about both.

What it prints goes to <state_dir>/up.log and is read from there, so that it needs no reader to go
on, and there is something to look at afterwards.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_engine.cli.running import ENV_MARK, write_lock_holder
from llm_engine.cli.screen import Screen
from llm_engine.config import Settings, dump

TICK_S = 0.1
LOG = "up.log"


class Platform:
    """The child process of one `up`, as events."""

    def __init__(self, settings: Settings, *, stay: bool, lock: int) -> None:
        folder = settings.cluster.state_dir
        self._log = folder / LOG
        self._rest = b""
        self.last_words = ""  # the last line that was no event: a traceback's cause
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deployments.local", *(["--stay"] if stay else [])],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(folder),
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C in the terminal reaches only us, who pass it on
            )
        self._reader = self._log.open("rb")
        write_lock_holder(lock, self._process.pid)
        assert self._process.stdin is not None
        try:
            line = json.dumps(dump(settings, reveal=True))
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once; its log says why
        # It lives for as long as this pipe, unless it was asked to stay.

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last call."""
        self._rest += self._reader.read()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
                event["event"]
            except (ValueError, TypeError, KeyError):
                self.last_words = line.decode(errors="replace").strip() or self.last_words
            else:
                yield event

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def let_go(self) -> None:
        """Leave it alone: for an `up` that stays."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.returncode = 0  # nobody waits for it any more

    def close(self) -> None:
        self._reader.close()
        if self._process.stdin is not None:
            self._process.stdin.close()


def _environment(folder: Path) -> dict[str, str]:
    """Ours, without the names of other Rays: this one is new."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")
    } | {ENV_MARK: str(folder)}


class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of letting them break in anywhere."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.count += 1


class Watch:
    """From the first event to the last: shows them, and decides when it is over."""

    def __init__(
        self, platform: Platform, screen: Screen, interrupts: Interrupts, detach: bool
    ) -> None:
        self._platform = platform
        self._screen = screen
        self._interrupts = interrupts
        self._detach = detach
        self._heard = 0  # interrupts that were acted upon
        self._stopping: int | None = None  # the exit code, once it is stopping

    def run(self) -> int:
        """The exit code; negative if the platform ended without being asked to."""
        while True:
            ended = self._platform.exit_code is not None  # first, so that all it said is read
            for event in self._platform.events():
                self._screen.hear(event)
            if ended:
                return self._code_at_end()
            if self._screen.settled and self._stopping is None and self._settle():
                return 0
            if self._interrupts.count > self._heard:
                self._heard = self._interrupts.count
                self._interrupted()
            time.sleep(TICK_S)

    def _settle(self) -> bool:
        """Everything has started, or failed to. True if nobody has to wait any longer."""
        if not self._screen.usable:
            self._stop(1, "no endpoint could start")
        elif not self._screen.shown:
            self._screen.show_ready(self._platform.pid if self._detach else None)
            if self._detach:
                self._platform.let_go()
                return True
        return False

    def _interrupted(self) -> None:
        if self._stopping is None:
            self._stop(0 if self._screen.shown else 130, "")
        elif self._heard == 2:
            self._screen.note("Still stopping; Ctrl-C once more kills what is left.")
        else:
            self._platform.kill()

    def _stop(self, code: int, because: str) -> None:
        self._stopping = code
        self._screen.stopping(because)
        self._platform.ask_to_stop()

    def _code_at_end(self) -> int:
        if self._stopping is not None:
            return self._stopping
        return -1 if self._platform.exit_code else 0  # `llm-engine down` ends it with 0
