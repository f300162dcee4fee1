"""JSON may be nested more deeply where it is read than where it is written. No I/O."""

from typing import Any

import orjson

#: Levels that are put around what a caller has sent: lists of records, events, rows.
ROOM = 16
_HARMLESS = 200  # brackets: with so few no JSON is too deep


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
