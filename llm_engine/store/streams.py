"""sference's streams: named queues of responses."""

import time
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.responses import FeedEntry, Stream, StreamCounts
from llm_engine.statuses import ResponseState, StreamState
from llm_engine.store import tables
from llm_engine.store.database import Database
from llm_engine.store.followed import BRIEF, read
from llm_engine.store.responses import Responses

table = tables.streams.c
TOGETHER = 200  # responses that are cancelled in one transaction
_COUNTED = {
    ResponseState.QUEUED: "pending",
    ResponseState.IN_PROGRESS: "running",
    ResponseState.COMPLETED: "completed",
    ResponseState.INCOMPLETE: "completed",
    ResponseState.FAILED: "failed",
    ResponseState.CANCELLED: "cancelled",
}


class Streams:
    def __init__(self, database: Database, responses: Responses) -> None:
        self._database = database
        self._responses = responses

    def add(self, record: Stream, most: int) -> None:
        """Raises Conflict where its owner has `most` that are not archived."""
        with self._database.writing() as connection:
            counted = sa.select(sa.func.count()).where(
                table.owner == record.owner, table.state != StreamState.ARCHIVED
            )
            if (connection.execute(counted).scalar() or 0) >= most:
                raise Conflict(
                    f"You have {most} streams, the most that are kept (responses.max_streams). "
                    "Archive some.",
                    code="too_many_streams",
                )
            connection.execute(tables.streams.insert().values(asdict(record)))

    def get(self, stream: str) -> Stream:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, stream)

    def page(self, owner: str | None, limit: int) -> list[Stream]:
        """Newest first."""
        wanted = sa.select(tables.streams).order_by(table.id.desc()).limit(limit)
        if owner is not None:
            wanted = wanted.where(table.owner == owner)
        with self._database.reading() as connection:
            return [_read(row) for row in connection.execute(wanted)]

    def close(self, stream: str, state: StreamState) -> Stream:
        """Cancel or archive it; again is no mistake. Raises NotFound, and Conflict where what was
        archived shall be cancelled."""
        closed = self._close(stream, state)
        while closed.state is StreamState.CANCELLED:
            # A few at a time: whoever ends a response waits for this.
            if not self._responses.cancel_waiting(stream, TOGETHER):
                break
        return closed

    def _close(self, stream: str, state: StreamState) -> Stream:
        now = time.time()
        with self._database.writing() as connection:
            found = _one(connection, stream, lock=True)
            if found.state is state:
                return found
            if found.state is StreamState.ARCHIVED:
                raise Conflict("The stream is archived.", param="status", code="stream_archived")
            values: dict[str, Any] = {"state": state, "updated_at": now}
            if state is StreamState.CANCELLED:
                values["cancelled_at"] = now
            else:
                values["archived_at"] = now
            mine = tables.streams.update().where(table.id == stream)
            connection.execute(mine.values(values))
            return _one(connection, stream)

    def counts(self, stream: str) -> StreamCounts:
        rows = tables.responses.c
        usage = rows.usage
        sums = [
            sa.func.coalesce(sa.func.sum(usage[name].as_integer()), 0).label(name)
            for name in ("input_tokens", "output_tokens")
        ]
        wanted = (
            sa.select(rows.state, sa.func.count().label("count"), *sums)
            .where(rows.stream == stream, rows.expires_at > time.time())
            .group_by(rows.state)
        )
        last = (
            sa.select(tables.feed.c.serial, *BRIEF)
            .join(tables.responses, rows.id == tables.feed.c.response)
            .where(tables.feed.c.stream == stream, rows.state == ResponseState.COMPLETED)
            .order_by(tables.feed.c.serial.desc())
            .limit(1)
        )
        values: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0}
        with self._database.reading() as connection:
            for row in connection.execute(wanted):
                name = _COUNTED[ResponseState(row.state)]
                values[name] = values.get(name, 0) + row._mapping["count"]
                values["input_tokens"] += row.input_tokens
                values["output_tokens"] += row.output_tokens
            newest = connection.execute(last).one_or_none()
        if newest is not None:
            values["last"] = FeedEntry(newest.serial, read(newest))
        return StreamCounts(**values)


def no_stream(stream: str) -> NotFound:
    return NotFound(f"Stream with id '{stream[:100]}' not found.", param="stream_id")


def _one(connection: sa.Connection, stream: str, lock: bool = False) -> Stream:
    if "\0" in stream:  # PostgreSQL knows no such text
        raise no_stream(stream)
    wanted = sa.select(tables.streams).where(table.id == stream)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_stream(stream)
    return _read(row)


def _read(row: Any) -> Stream:
    return Stream(**{**row._mapping, "state": StreamState(row.state)})
