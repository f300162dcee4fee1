"""JSON that would cost far more than its text: nested more deeply than it can be written again, or
made of more than fits into memory."""

from collections.abc import Iterator
from typing import Any, Protocol

import orjson

#: Levels that are put around what a caller has sent: lists of records, events, rows.
ROOM = 16
_HARMLESS = 200  # brackets: with so few no JSON is too deep
#: What a hostile item could make of a few bytes: paths that cost their length at each value, levels
#: whose empty keys make no path longer, and values that cost 30 times their text.
_LONGEST_PATH = 2_000  # characters
_MOST_LEVELS = 1_000
MOST_VALUES = 1_000_000  # of an item

Event = tuple[str, str, Any]  # ijson's: a path, what is there, its value


class TooMuch(Exception):
    """An item that would take far more memory than its text."""


class Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def is_too_deep(data: Any, read_from: bytes | None = None) -> bool:
    """Whether it could not be written again, ROOM levels further down.

    `read_from`: the JSON that it was read from, which spares looking at most of what comes.
    """
    if read_from is not None and read_from.count(b"{") + read_from.count(b"[") < _HARMLESS:
        return False
    for _ in range(ROOM):
        data = [data]
    try:
        orjson.dumps(data)
    except (TypeError, RecursionError):  # orjson's own error is a TypeError
        return True
    return False


def watched(source: Readable, item: str | None = None) -> Iterator[Event]:
    """A JSON document as ijson's events, for `ijson.items`. Raises TooMuch, and ijson.JSONError.

    `item`: the path of what has the limits each; None: the whole document has them.
    """
    import ijson

    # One event at a time: in one go ijson makes the paths of 64 KiB before the first can be seen.
    events = ijson.parse(ijson.basic_parse(source, use_float=True))
    values = levels = 0
    for path, event, value in events:
        if event in ("start_map", "start_array"):
            levels += 1
        elif event in ("end_map", "end_array"):
            levels -= 1
        values += 1
        if values > MOST_VALUES or levels > _MOST_LEVELS or len(path) > _LONGEST_PATH:
            raise TooMuch("it is nested too deeply, or holds too many values")
        if path == item and event != "map_key":  # it begins, or has ended
            values = 0
        yield path, event, value
