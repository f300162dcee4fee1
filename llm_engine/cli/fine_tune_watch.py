"""A fine-tune as it runs, until it is over: how far it is, how fast, how its loss falls.

The gateway is asked once a second, for the job and for what is new of its events. In a terminal
the curve is drawn and redrawn, elsewhere each event is a line, and every few seconds there is one
for what moved. A gateway that goes away is waited for, some minutes.
"""

import time
from typing import TYPE_CHECKING, Any

from llm_engine.cli import console, loss_chart
from llm_engine.cli.client import Gateway, Unreachable, item_path
from llm_engine.cli.watch import Patience

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PERIOD_S = 1.0
LINE_PERIOD_S = 5.0  # between two lines where nothing can be redrawn
BAR_WIDTH = 30
FIRST_EVENTS, NEW_EVENTS = 1000, 100  # of one question; the first is the one for what was before
ENDED = ("succeeded", "failed", "cancelled")
JOBS = "fine_tuning/jobs"
Row = dict[str, Any]


def follow(gateway: Gateway, row: Row, out: "Console", hint: str = "") -> Row:
    """Until it has ended; its last row. Raises when the gateway stays away."""
    job = row["id"]
    events = Events(gateway, job)
    try:
        with Display(out) as display:
            patience = Patience(display.note)
            while True:
                try:
                    row = gateway.get(item_path(JOBS, job))
                    new = events.new()
                    patience.found()
                except Unreachable as error:
                    patience.lost(error)
                else:
                    display.show(row, new)
                    if row["status"] in ENDED:
                        return row
                time.sleep(PERIOD_S)
    except KeyboardInterrupt:
        console.say(
            "It goes on unwatched.\n"
            f"Watch it:  llm-engine fine-tunes get {job} --watch{hint}\n"
            f"Cancel it: llm-engine fine-tunes cancel {job}{hint}",
            "dim",
            stderr=True,
        )
        raise


class Events:
    """What a job has told since it was asked last."""

    def __init__(self, gateway: Gateway, job: str) -> None:
        self._gateway = gateway
        self._path = item_path(JOBS, job, "/events")
        self._last = ""

    def new(self) -> list[Row]:
        """Oldest first. Of those from before the first question, the last thousand."""
        found: list[Row] = []
        limit, after = NEW_EVENTS if self._last else FIRST_EVENTS, ""
        while True:
            page = self._gateway.get(f"{self._path}?limit={limit}{after}")
            for event in page["data"]:
                if event["id"] == self._last:
                    break
                found.append(event)
            else:
                if self._last and page["has_more"]:
                    after = f"&after={page['data'][-1]['id']}"
                    continue
            break
        if found:
            self._last = found[0]["id"]
        return found[::-1]


def amounts(row: Row) -> list[str]:
    """How far it is and how fast, as far as it is known."""
    progress = row.get("progress") or {}
    step, total = progress.get("step") or 0, progress.get("total_steps")
    found = [f"step {step:,}/{total:,}"] if total else []
    if progress.get("train_loss") is not None:
        found.append(f"loss {progress['train_loss']:.4g}")
    if row["status"] == "running":
        if progress.get("tokens_per_s"):
            found.append(f"{progress['tokens_per_s']:,.0f} tokens/s")
        if progress.get("left_s"):
            found.append(f"about {console.duration(progress['left_s'])} left")
    return found


class Display:
    """Only draws: it is told rows and events and never asks anybody anything."""

    def __init__(self, out: "Console") -> None:
        self._out = out
        self._live: Any = None
        self._row: Row | None = None
        self._train: dict[int, float] = {}
        self._valid: dict[int, float] = {}
        self._message = ""
        self._note = ""
        self._told: tuple[str, str | None] | None = None  # the state and reason of the last line
        self._line = ""
        self._told_at = 0.0  # monotonic

    def __enter__(self) -> "Display":
        if self._out.is_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self.draw, console=self._out, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: Row, events: list[Row]) -> None:
        """`events`: those that are new."""
        self._row = row
        for event in events:
            self._take(event)
        if self._live is not None:
            return
        told, line, now = (row["status"], row.get("status_reason")), _line(row), time.monotonic()
        if told != self._told or (line != self._line and now - self._told_at >= LINE_PERIOD_S):
            self._told, self._line, self._told_at = told, line, now
            self._print(line)

    def note(self, text: str, *, passing: bool = False) -> None:
        """`passing`: drawn, it says nothing that the picture does not."""
        self._note = "" if passing else text
        if self._live is None:
            self._print(text)

    def draw(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = self._row
        if row is None:
            return Text("")
        status = row["status"]
        style = console.STYLES.get(status, "")
        title = Text.assemble(
            (row["id"], "bold"), "  ", (status, style), (f"  {console.plain(row['model'])}", "dim")
        )
        progress = row.get("progress") or {}
        total = progress.get("total_steps") or 0
        grid = Table.grid(padding=(0, 1))
        waits = not total and status not in ENDED
        done = progress.get("step") or 0
        bar = ProgressBar(total=total or 1, completed=done, width=BAR_WIDTH, pulse=waits)
        grid.add_row(bar, Text("  ".join(amounts(row)), "dim"))
        parts: list[RenderableType] = [title, grid]
        curves = [self._train, self._valid]
        dots = (self._out.encoding or "").lower().startswith("utf")
        chart = loss_chart.draw(curves, total, self._out.width, dots=dots)
        if chart:
            parts += [chart, self._legend()]
        if status not in ENDED:
            reason = console.plain(row.get("status_reason") or "") or self._message
            parts += [Text(reason, "dim")] if reason else []
            parts += [Text(console.plain(self._note), "yellow")] if self._note else []
        return Group(*parts)

    def _take(self, event: Row) -> None:
        data = event.get("data") or {}
        if event["type"] != "metrics" or "step" not in data:
            self._message = console.plain(event["message"])
            if self._live is None:
                self._print(event["message"])
            return
        step = int(data["step"])
        # Steps that a crash has cost are trained again.
        for curve in (self._train, self._valid):
            for later in [each for each in curve if each >= step]:
                del curve[later]
        for curve, name in ((self._train, "train_loss"), (self._valid, "valid_loss")):
            if data.get(name) is not None:
                curve[step] = float(data[name])

    def _legend(self) -> "RenderableType":
        from rich.text import Text

        text = Text(" " * (loss_chart.LABEL + 2))
        named = zip((self._train, self._valid), loss_chart.STYLES, ("train", "valid"), strict=True)
        for curve, style, name in named:
            if curve:
                text.append(f"{name} loss {curve[max(curve)]:.4g}  ", style)
        return text

    def _print(self, text: str) -> None:
        self._out.print(console.plain(text), soft_wrap=True)


def _line(row: Row) -> str:
    known = ", ".join(amounts(row))
    reason = row.get("status_reason")
    return (
        f"{row['id']} {row['status'].replace('_', ' ')}"
        f"{': ' if known else ''}{known}{f' ({reason})' if reason else ''}"
    )
