"""`endpoints watch`: a start, an update or a delete, phase by phase, until it is over.

The gateway is asked once a second. In a terminal the phases are drawn and redrawn, elsewhere each
change is a line. A gateway that goes away is waited for, some minutes.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_engine.cli import console
from llm_engine.cli.client import Gateway, Refused, Unreachable, endpoint_path
from llm_engine.errors import LLMEngineError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PERIOD_S = 1.0
PATIENCE_S = 180.0  # a gateway that restarts is back by then
PHASES = {
    "queued": "queued_s",
    "scheduling": "scheduling_s",
    "loading weights": "loading_s",
    "warming": "warming_s",
}
LAST = "ready"
STOPPING = "finishing requests"
ENDED = ("READY", "UPDATE_FAILED")
DELETING = "DELETE_IN_PROGRESS"
BAR_WIDTH = 30
Row = dict[str, Any]


def follow(
    gateway: Gateway,
    name: str,
    row: Row | None = None,
    *,
    deleting: bool = False,
    hint: str = "",
    stderr: bool = False,
) -> Row | None:
    """Until it is ready or gone; its last row, None if it is gone. Raises for a failure.

    `row`: what the request that began it was answered, if it began here.
    """
    display = Display(name, console.console(stderr=stderr), deleting)
    try:
        with display:
            last = _Watch(gateway, name, row, display).run()
    except KeyboardInterrupt:
        again = f"llm-engine endpoints watch {shlex.quote(name)}{hint}"
        console.say(f"It goes on unwatched. Again: {again}", "dim", stderr=True)
        raise
    if last is None:
        console.say(f"{name} is gone.", "green", stderr=stderr)
    elif last["status"] == "UPDATE_FAILED":
        why = last["status_reason"] or last["last_error"] or "nobody knows why"
        raise LLMEngineError(f"the endpoint '{name}' failed: {why}")
    else:
        console.say(_success(last), "green", stderr=stderr)
    return last


def truth(row: Row) -> Row:
    """Right after a change the gateway still tells the phases of the start before."""
    return row | {"phases": {}, "eta_s": None} if row["status"] == "UPDATE_PENDING" else row


@dataclass(frozen=True, slots=True)
class Step:
    label: str
    state: str  # waiting | running | done | failed
    seconds: float | None = None  # None: not over yet, or not known


def steps(row: Row) -> list[Step]:
    """The phases of a start, as far as it has come."""
    status, phases = row["status"], row["phases"]
    if status == DELETING:
        return [Step(STOPPING, "running")]
    if status == "READY":
        done = [Step(label, "done", phases.get(key)) for label, key in PHASES.items()]
        return [*done, Step(LAST, "done", phases.get("total_s"))]
    known = {label: phases.get(key) for label, key in PHASES.items()}
    found: list[Step] = []
    current = "failed" if status == "UPDATE_FAILED" else "running"
    for label in [*PHASES, LAST]:
        seconds = known.get(label)
        if seconds is not None and current != "waiting":
            found.append(Step(label, "done", seconds))
        else:
            found.append(Step(label, current))
            current = "waiting"
    return found


def phases_line(row: Row) -> str:
    return ", ".join(
        f"{label} {console.duration(row['phases'][key])}"
        for label, key in PHASES.items()
        if row["phases"].get(key) is not None
    )


def _success(row: Row) -> str:
    total = row["phases"].get("total_s")
    after = "" if total is None else f" after {console.duration(total)}"
    replicas = f"{row['replicas_ready']}/{row['replicas_wanted']} replicas"
    reason = f" ({row['status_reason']})" if row["status_reason"] else ""
    return f"{row['id']} is ready{after}: {replicas}{reason}"


class _Watch:
    def __init__(self, gateway: Gateway, name: str, row: Row | None, display: "Display") -> None:
        self._gateway, self._path = gateway, endpoint_path(name)
        self._name, self._display = name, display
        self._row = row and truth(row)
        self._patience = Patience(display.note)

    def run(self) -> Row | None:
        if self._row is not None:
            self._display.show(self._row, self._gateway.skew_s)
        while True:
            row = self._look()
            if row is None:
                self._display.end(None)
                return None
            self._row = row
            if row["settled"] and row["status"] in ENDED:
                self._display.end(row)
                return row
            self._display.show(row, self._gateway.skew_s)
            time.sleep(PERIOD_S)

    def _look(self) -> Row | None:
        """The endpoint as it is now, as it was where nobody answers, or None where it is gone."""
        try:
            row = truth(self._gateway.get(self._path))
        except Refused as error:
            if error.code == "endpoint_not_found" and self._row is not None:
                return self._gone()
            raise
        except Unreachable as error:
            if self._row is None:
                raise
            self._patience.lost(error)
            return self._row
        self._patience.found()
        another = self._row is not None and row["created_at"] != self._row["created_at"]
        return self._gone() if another and self._is_deleting() else row

    def _is_deleting(self) -> bool:
        shown = self._row is not None and self._row["status"] == DELETING
        return self._display.deleting or shown

    def _gone(self) -> None:
        if not self._is_deleting():
            raise LLMEngineError(f"the endpoint '{self._name}' was deleted meanwhile.")


class Patience:
    """With a gateway that does not answer for a while. `note` is told when it goes and returns."""

    def __init__(self, note: Callable[..., None]) -> None:
        self._note = note
        self._lost_at: float | None = None

    def lost(self, error: Unreachable) -> None:
        """Raises LLMEngineError once it has lasted too long."""
        now, problem = time.monotonic(), f"{str(error).rstrip('.')}."
        if self._lost_at is None:
            self._lost_at = now
            limit = console.duration(PATIENCE_S)
            self._note(f"{problem} Trying again, for up to {limit}.")
        elif now - self._lost_at > PATIENCE_S:
            waited = console.duration(now - self._lost_at)
            raise LLMEngineError(f"{problem} Given up after {waited}.")

    def found(self) -> None:
        if self._lost_at is not None:
            self._lost_at = None
            self._note("The gateway answers again.", passing=True)


class Display:
    """Only draws: it is told rows and never asks anybody anything."""

    def __init__(self, name: str, out: "Console", deleting: bool = False) -> None:
        self.deleting = deleting  # the end that is hoped for is that it is gone
        self._name = name
        self._out = out
        self._live: Any = None
        self._spinner: Any = None
        self._row: Row | None = None
        self._seen_at = 0.0  # monotonic, as all times here
        self._running: str | None = None  # the phase that runs
        self._began = 0.0
        self._note = self._line = ""
        self._over = self._gone = False

    def __enter__(self) -> "Display":
        if self._out.is_terminal:
            from rich.live import Live
            from rich.spinner import Spinner

            self._spinner = Spinner("dots", style="cyan")
            self._live = Live(get_renderable=self.draw, console=self._out, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: Row, skew_s: float = 0.0) -> None:
        """`skew_s`: how far the clock that its times are from is ahead of ours."""
        if self.deleting:
            row = row | {"status": DELETING}
        self._keep_time(row, skew_s)
        self._row, self._seen_at = row, time.monotonic()
        if self._live is None and self._describe(row) != self._line:
            self._line = self._describe(row)
            self._print(self._line)

    def end(self, row: Row | None) -> None:
        """The last picture; how it ended is told below it. None: it is gone."""
        self._row, self._over = row or self._row, True
        self._gone = row is None

    def note(self, text: str, *, passing: bool = False) -> None:
        """`passing`: drawn, it says nothing that the picture does not."""
        self._note = "" if passing else text
        if self._live is None:
            self._print(text)

    def draw(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        row = self._row
        if row is None:
            return Text("")
        if self._gone:
            return self._grid([Step(STOPPING, "done", time.monotonic() - self._began)])
        parts = [self._title(row), self._grid(steps(row))]
        if row["eta_s"] is not None and not self._over:
            parts.append(self._eta(row))
        if not self._over:
            reason = console.plain(row["status_reason"] or "")
            parts += [Text(reason, "dim")] if reason else []
            parts += [Text(console.plain(self._note), "yellow")] if self._note else []
        return Group(*parts)

    def _keep_time(self, row: Row, skew_s: float) -> None:
        running = next((step.label for step in steps(row) if step.state == "running"), None)
        if running == self._running:
            return
        now = time.monotonic()
        first = self._row is None  # what ran before we looked began with the last change of it
        earlier = max(0.0, time.time() + skew_s - row["updated_at"]) if first else 0.0
        self._running, self._began = running, now - earlier

    def _describe(self, row: Row) -> str:
        word = console.WORDS.get(row["status"], row["status"])
        reason = f": {row['status_reason']}" if row["status_reason"] else ""
        facts = [f"{row['replicas_ready']}/{row['replicas_wanted']} replicas"]
        facts += [phases_line(row)] if phases_line(row) else []
        return f"{self._name} {word}{reason} ({'; '.join(facts)})"

    def _print(self, text: str) -> None:
        self._out.print(console.plain(text), soft_wrap=True)

    def _title(self, row: Row) -> "RenderableType":
        from rich.text import Text

        replicas = f"  {row['replicas_ready']}/{row['replicas_wanted']} replicas ready"
        status = (row["status"], console.STYLES.get(row["status"], ""))
        return Text.assemble((self._name, "bold"), "  ", status, (replicas, "dim"))

    def _grid(self, found: list[Step]) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(no_wrap=True, min_width=16)
        grid.add_column(justify="right", min_width=6, style="dim", no_wrap=True)
        for step in found:
            seconds = step.seconds
            if step.state == "running":
                mark = self._spinner.render(time.monotonic()) if self._spinner else Text("~")
                seconds = time.monotonic() - self._began
            else:
                mark = Text(*console.MARKS[step.state])
            took = "" if seconds is None else console.duration(seconds)
            grid.add_row(mark, step.label, took)
        return grid

    def _eta(self, row: Row) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        left = max(0.0, row["eta_s"] - (now - self._seen_at))
        past = [step.seconds or 0.0 for step in steps(row) if step.label != "queued"]
        spent = sum(past) + (now - self._began if self._running != "queued" else 0.0)
        grid = Table.grid(padding=(0, 1))
        words = f"about {console.duration(left)} left" if left else "longer than usual"
        bar = ProgressBar(total=max(spent + left, 0.1), completed=spent, width=BAR_WIDTH)
        grid.add_row(bar, Text(words, "dim"))
        return grid
