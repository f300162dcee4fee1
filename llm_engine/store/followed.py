"""What readers follow of responses: their events, and the feed of what has ended."""

import time
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from llm_engine.responses import FeedEntry, ResponseRecord
from llm_engine.statuses import ResponseState
from llm_engine.store import tables
from llm_engine.store.database import Database

table = tables.responses.c
feed = tables.feed.c
log = tables.response_events.c
_LONG = ("request", "input", "output")  # megabytes, perhaps
#: For lists: all of a record but these.
BRIEF = [column for column in table if column.name not in _LONG]


class Followed:
    """The part of `Responses` that only reads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def events(self, response: str, after: int, limit: int = 500) -> list[bytes]:
        """Its events with a higher sequence number than `after`, in JSON, in order."""
        wanted = sa.select(log.first, log.events).where(log.response == response, log.last > after)
        found: list[bytes] = []
        with self._database.reading() as connection:
            # A row holds one event at least.
            for row in connection.execute(wanted.order_by(log.first).limit(limit)):
                lines = row.events.encode().split(b"\n")
                found += lines[max(0, after + 1 - row.first) :]
                if len(found) >= limit:
                    break
        return found

    def standing(self, responses: Collection[str]) -> dict[str, tuple[int, bool]]:
        """How many events each has told, and whether it has ended; those that are there."""
        wanted = sa.select(table.id, table.told, table.state).where(table.id.in_(responses))
        with self._database.reading() as connection:
            return {
                row.id: (row.told, ResponseState(row.state).is_final)
                for row in connection.execute(wanted)
            }

    def news(self, serial: int | None) -> tuple[int, set[tuple[str, str | None]]]:
        """The feed's last serial, and whose entries came after `serial`: of which owner, in which
        stream. None: whatever is there is known."""
        with self._database.reading() as connection:
            last = connection.execute(sa.select(sa.func.max(feed.serial))).scalar() or 0
            if serial is None:
                return last, set()
            later = sa.select(feed.owner, feed.stream).where(feed.serial > serial).distinct()
            return last, {(row.owner, row.stream) for row in connection.execute(later)}

    def last_serial(self) -> int:
        """The highest that the feed has given out, whether or not its entry is still there."""
        given = (
            "SELECT seq FROM sqlite_sequence WHERE name = 'feed'"
            if self._database.is_sqlite
            else "SELECT pg_sequence_last_value(pg_get_serial_sequence('feed', 'serial')::regclass)"
        )
        with self._database.reading() as connection:
            return connection.execute(sa.text(given)).scalar() or 0

    def feed(
        self,
        owner: str | None,
        stream: str | None,
        *,
        limit: int,
        after: int | None = None,
        before: int | None = None,
    ) -> tuple[list[FeedEntry], bool]:
        """What has ended in `stream`, or outside of all streams, without what was asked, and
        whether there is more.

        With `after` the entries with a higher serial, oldest first; else newest first.
        """
        wanted = (
            sa.select(feed.serial, *BRIEF, table.output)
            .join(tables.responses, table.id == feed.response)
            .where(feed.stream.is_(None) if stream is None else feed.stream == stream, alive())
            .order_by(feed.serial if after is not None else feed.serial.desc())
            .limit(limit + 1)
        )
        if owner is not None:
            wanted = wanted.where(feed.owner == owner)
        if after is not None:
            wanted = wanted.where(feed.serial > after)
        if before is not None:
            wanted = wanted.where(feed.serial < before)
        with self._database.reading() as connection:
            rows = connection.execute(wanted).all()
        found = [FeedEntry(row.serial, read(row)) for row in rows]
        return found[:limit], len(found) > limit


def alive() -> sa.ColumnElement[bool]:
    return table.expires_at > time.time()


def read(row: Any) -> ResponseRecord:
    values = {name: row._mapping[name] for name in table.keys() if name in row._mapping}
    return ResponseRecord(**values | {"state": ResponseState(row.state)})
