"""A batch as it runs, until it is over: how far it is, how fast, what failed, what it waits for.

The gateway is asked once a second. In a terminal a bar is drawn and redrawn, elsewhere there is a
line for each change of state, and every few seconds one for what moved. A gateway that goes away is
waited for, some minutes.
"""

import time
from typing import TYPE_CHECKING, Any

from llm_engine.cli import console
from llm_engine.cli.client import Gateway, Unreachable, item_path
from llm_engine.cli.watch import Patience

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PERIOD_S = 1.0
LINE_PERIOD_S = 5.0  # between two lines where nothing can be redrawn
BAR_WIDTH = 30
ENDED = ("completed", "failed", "expired", "cancelled")
Row = dict[str, Any]


def follow(gateway: Gateway, row: Row, out: "Console", hint: str = "") -> Row:
    """Until it has ended; its last row. Raises when the gateway stays away."""
    batch = row["id"]
    try:
        with Display(out) as display:
            patience = Patience(display.note)
            while True:
                display.show(row)
                if row["status"] in ENDED:
                    return row
                time.sleep(PERIOD_S)
                try:
                    row = gateway.get(item_path("batches", batch))
                    patience.found()
                except Unreachable as error:
                    patience.lost(error)
    except KeyboardInterrupt:
        console.say(
            "It goes on unwatched.\n"
            f"Watch it:  llm-engine batches get {batch} --watch{hint}\n"
            f"Cancel it: llm-engine batches cancel {batch}{hint}",
            "dim",
            stderr=True,
        )
        raise


def amounts(row: Row) -> list[str]:
    """What is done and how fast, as far as it is known."""
    counts, progress = row["request_counts"], row.get("progress") or {}
    done = counts["completed"] + counts["failed"]
    found = [f"{done:,}/{counts['total']:,} rows"] if counts["total"] else []
    if counts["failed"]:
        found.append(f"{counts['failed']:,} failed")
    if row["status"] not in ENDED:
        for key, unit in (("rows_per_s", "rows/s"), ("tokens_per_s", "tokens/s")):
            if progress.get(key):
                found.append(f"{rate(progress[key])} {unit}")
        if progress.get("eta_s") and row["status"] == "in_progress":
            found.append(f"about {console.duration(progress['eta_s'])} left")
    return found


def rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}" if per_s >= 1 else f"{per_s:.2g}"


class Display:
    """Only draws: it is told rows and never asks anybody anything."""

    def __init__(self, out: "Console") -> None:
        self._out = out
        self._live: Any = None
        self._row: Row | None = None
        self._note = ""
        self._told: tuple[str, str | None] | None = None  # the state and reason of the last line
        self._line = ""
        self._told_at = 0.0  # monotonic

    def __enter__(self) -> "Display":
        if self._out.is_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self.draw, console=self._out, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, row: Row) -> None:
        self._row = row
        if self._live is not None:
            return
        told, line, now = (
            (row["status"], row.get("status_reason")),
            _describe(row),
            time.monotonic(),
        )
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
        model = f"  {console.plain(row['model'])}" if row.get("model") else ""
        style = console.STYLES.get(status, "")
        title = Text.assemble((row["id"], "bold"), "  ", (status, style), (model, "dim"))
        counts = row["request_counts"]
        done = counts["completed"] + counts["failed"]
        grid = Table.grid(padding=(0, 1))
        unknown = not counts["total"] and status not in ENDED
        total = counts["total"] or 1
        bar = ProgressBar(total=total, completed=done, width=BAR_WIDTH, pulse=unknown)
        grid.add_row(bar, Text("  ".join(amounts(row)), "dim"))
        parts: list[RenderableType] = [title, grid]
        if status not in ENDED:
            reason = console.plain(row.get("status_reason") or "")
            parts += [Text(reason, "dim")] if reason else []
            parts += [Text(console.plain(self._note), "yellow")] if self._note else []
        return Group(*parts)

    def _print(self, text: str) -> None:
        self._out.print(console.plain(text), soft_wrap=True)


def _describe(row: Row) -> str:
    known = ", ".join(amounts(row))
    reason = row.get("status_reason")
    return (
        f"{row['id']} {row['status'].replace('_', ' ')}"
        f"{': ' if known else ''}{known}{f' ({reason})' if reason else ''}"
    )
