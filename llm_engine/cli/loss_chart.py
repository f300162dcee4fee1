"""A loss curve of text: two lines over the steps of a training, in dots that are an eighth of a
character, or in stars where the terminal has no such characters. Pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

HEIGHT = 8  # characters
WIDTH, NARROWEST = 60, 16
LABEL = 7  # characters of a number beside it
DOTS = {True: (2, 4), False: (1, 1)}  # across and down in a character
_BRAILLE = 0x2800
#: By their place in a character: across, down.
_DOT = (0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80)
STYLES = ("cyan", "magenta")
Curve = Mapping[int, float]  # by step


def draw(curves: Sequence[Curve], last_step: int, width: int, *, dots: bool = True) -> "Text":
    """`curves`: at most two, the second above the first; `last_step`: where the axis ends;
    `width`: of all of it. Nothing where there are less than two numbers, or no room."""
    from rich.text import Text

    width = min(width - LABEL - 2, WIDTH)
    values = [value for curve in curves for value in curve.values()]
    if width < NARROWEST or len(values) < 2:
        return Text()
    low, high = min(values), max(values)
    across, down = DOTS[dots]
    columns, rows = width * across, HEIGHT * down
    last_step = max(last_step, *(step for curve in curves for step in curve), 1)

    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for curve, style in zip(curves, STYLES, strict=False):
        placed = {
            x: round((high - value) / ((high - low) or 1) * (rows - 1))
            for x, value in _columns(curve, last_step, columns).items()
        }
        for x, y in _line(placed):
            cell = (x // across, y // down)
            before = cells.get(cell, (0, ""))
            bits = before[0] if before[1] == style else 0
            cells[cell] = (bits | _DOT[x % across][y % down], style)

    text = Text()
    for row in range(HEIGHT):
        label = _number(high) if row == 0 else _number(low) if row == HEIGHT - 1 else ""
        text.append(f"{label:>{LABEL}} ", "dim").append("│" if dots else "|", "dim")
        for column in range(width):
            bits, style = cells.get((column, row), (0, ""))
            text.append(_character(bits, dots), style)
        text.append("\n")
    end = f"step {last_step:,}"
    text.append(f"{'':>{LABEL}} {'└' if dots else '+'}{end:>{width}}", "dim")
    return text


def _columns(curve: Curve, last_step: int, columns: int) -> dict[int, float]:
    """The mean of what falls into each column of dots."""
    found: dict[int, list[float]] = {}
    for step, value in curve.items():
        found.setdefault(round(step / last_step * (columns - 1)), []).append(value)
    return {x: sum(values) / len(values) for x, values in sorted(found.items())}


def _line(placed: Mapping[int, int]) -> set[tuple[int, int]]:
    """The points, and what lies between two of them."""
    points = set(placed.items())
    for (x0, y0), (x1, y1) in pairwise(sorted(placed.items())):
        length = max(x1 - x0, abs(y1 - y0))
        for part in range(1, length):
            share = part / length
            points.add((round(x0 + (x1 - x0) * share), round(y0 + (y1 - y0) * share)))
    return points


def _character(bits: int, dots: bool) -> str:
    if not bits:
        return " "
    return chr(_BRAILLE + bits) if dots else "*"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.1e}"
