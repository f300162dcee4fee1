"""How the command line prints: two Rich consoles, colours of states, durations, tables.

Text from outside (models, error messages) is never read as Rich markup.
"""

import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 160  # columns where there is no terminal to measure
STYLES = {
    "READY": "green",
    "UPDATE_FAILED": "red",
    "UPDATE_PENDING": "dim",
    "UPDATE_IN_PROGRESS": "yellow",
    "DELETE_IN_PROGRESS": "yellow",
    "validating": "dim",
    "in_progress": "yellow",
    "finalizing": "yellow",
    "cancelling": "yellow",
    "completed": "green",
    "failed": "red",
    "expired": "red",
    "cancelled": "red",
    "validating_files": "dim",
    "queued": "dim",
    "running": "yellow",
    "paused": "yellow",
    "succeeded": "green",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}
#: What the states of an endpoint are called in a sentence.
WORDS = {
    "UPDATE_PENDING": "is waiting",
    "UPDATE_IN_PROGRESS": "is starting",
    "READY": "is ready",
    "UPDATE_FAILED": "failed",
    "DELETE_IN_PROGRESS": "is stopping",
}
#: How a step on the way there is marked; one that runs has a spinner.
MARKS = {"done": ("✓", "green"), "failed": ("✗", "red"), "waiting": ("·", "dim")}
#: Control characters but newline and tab: what a model says must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    measured = stream.isatty() or "COLUMNS" in os.environ
    width = None if measured else PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def say(text: str, style: str = "", *, stderr: bool = False) -> None:
    """One line, wrapped by the terminal and not by us, so that it can be copied."""
    console(stderr=stderr).print(plain(text), style=style, soft_wrap=True)


def print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2))


def complain(text: str) -> None:
    say(f"llm-engine: {text}", "red", stderr=True)


def table(columns: Iterable[str]) -> "Table":
    from rich import box
    from rich.table import Table

    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        built.add_column(column, overflow="fold")
    return built


def facts(known: dict[str, object]) -> "Table":
    """A label and what is known, a line each; what is empty is left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in known.items():
        if value:
            grid.add_row(label, plain(value) if isinstance(value, str) else value)
    return grid


def coloured(word: str) -> object:
    from rich.text import Text

    return Text(word, style=STYLES.get(word, ""))


def plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return _CONTROL.sub("", text)


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def moment(at: float | None) -> str:
    """Unix seconds as the clock on the wall here shows them."""
    from datetime import datetime

    return "" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def bytes_(size: int) -> str:
    """As `ls -h` would, with a thousand as the base: 512 bytes, 4.1 kB, 1.2 GB."""
    from rich.filesize import decimal

    return decimal(size)
