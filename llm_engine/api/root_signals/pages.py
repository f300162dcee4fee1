"""Pages of a list, by cursors that the client sends back as they are.

A cursor holds the place of a row in the order, not a number: what is added or deleted meanwhile
neither repeats nor hides another row.
"""

import base64
from collections.abc import Callable
from typing import Any

import orjson

from llm_engine.api.root_signals.rows import Row
from llm_engine.errors import InvalidRequest

DEFAULT_SIZE = 100
LARGEST = 1000
Place = tuple[float | str, str]
_ORDERS: dict[str, Callable[[Row], Place]] = {
    "created_at": lambda row: (row.created, row.id),
    "name": lambda row: (row.name, row.id),
}


def page(rows: list[Row], ordering: str, cursor: str | None, size: int) -> dict[str, Any]:
    """Raises InvalidRequest for an ordering or a cursor that does not exist."""
    place = _ORDERS.get(ordering.removeprefix("-"))
    if place is None:
        known = ", ".join(f"{name}, -{name}" for name in _ORDERS)
        raise InvalidRequest(f"'ordering' may be one of {known}.", param="ordering")
    descending = ordering.startswith("-")
    rows = sorted(rows, key=place, reverse=descending)
    start = 0
    if cursor is not None:
        backwards, marked = _decode(cursor, ordering)
        before = sum(_is_before(place(row), marked, descending) for row in rows)
        if backwards:
            start = max(0, before - size)
            size = min(size, before)
        else:
            start = before + any(place(row) == marked for row in rows)
    chosen = rows[start : start + size]
    more, less = start + size < len(rows), start > 0
    return {
        "next": _encode(ordering, False, place(chosen[-1])) if chosen and more else None,
        "previous": _encode(ordering, True, place(chosen[0])) if chosen and less else None,
        "results": [row.shown for row in chosen],
    }


def _is_before(one: Place, other: Place, descending: bool) -> bool:
    try:
        return one > other if descending else one < other  # type: ignore[operator]
    except TypeError:
        raise _bad_cursor() from None


def _encode(ordering: str, backwards: bool, place: Place) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([ordering, backwards, *place])).decode()


def _decode(cursor: str, ordering: str) -> tuple[bool, Place]:
    try:
        made_for, backwards, key, id = orjson.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError):
        raise _bad_cursor() from None
    if made_for != ordering or not isinstance(id, str):
        raise _bad_cursor()
    return bool(backwards), (key, id)


def _bad_cursor() -> InvalidRequest:
    return InvalidRequest(
        "Invalid 'cursor': send `next` or `previous` of the last page as it is, with the same "
        "'ordering'.",
        param="cursor",
    )
