"""Responses: what was asked, what came of it, who works on it, and the order in which they ended.

    queued ── claim ──▶ in_progress ── end ──▶ completed | incomplete | failed | cancelled
      ▲ │                    │
      │ └─ cancelled         │  (release: its gateway stops, and one that dies is found by its
      └─ release, put_back ──┘   lease; put_back: its model is away)

Only those in the background are ever queued. What answers while its client waits is written once,
with its end.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, InvalidRequest, LeaseLost, NotFound, Overloaded
from llm_engine.responses import ResponseEnd, ResponseRecord
from llm_engine.statuses import ResponseState, StreamState
from llm_engine.store import conversations, idempotency, tables
from llm_engine.store.database import Lock
from llm_engine.store.followed import BRIEF, Followed, alive, feed, log, read, table
from llm_engine.store.idempotency import Once

ROUTE = "responses"  # of the idempotency keys that make them
#: What a response goes on from is kept for longer by this share of its life: not each turn shall
#: write all that came before it.
KEPT_LONGER = 0.01
#: An owner's model: another's of the same name may be another model.
Whose = tuple[str, str]
_WHOSE = sa.tuple_(table.owner, table.model)
_OPEN = (ResponseState.QUEUED, ResponseState.IN_PROGRESS)


class Responses(Followed):
    # -- what clients do

    def add(
        self,
        record: ResponseRecord,
        events: list[bytes] | None = None,
        max_open: int | None = None,
        once: Once | None = None,
    ) -> ResponseRecord:
        """The record, or what `once` has made before, with its first events. One that has ended is
        in the feed, and its conversation, at once. Raises Overloaded where its owner has `max_open`
        that have not ended, Conflict where `once` was something else or its stream is not open."""
        ended = record.state.is_final
        with self._database.writing() as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return _one(connection, first)
            if max_open is not None and not ended:
                _check_room(connection, record.owner, max_open)
            if record.stream is not None and not ended:
                _check_stream(connection, record.stream)
            if events:
                _log(connection, record, events)
                record = replace(record, told=len(events))
            connection.execute(tables.responses.insert().values(asdict(record)))
            if record.previous is not None:
                _keep_chain(connection, record)
            if ended:
                self._publish(connection, record)
        return record

    def get(self, response: str) -> ResponseRecord:
        """Raises NotFound, also once it has expired."""
        with self._database.reading() as connection:
            return _one(connection, response)

    def chain(self, response: str, longest: int, most_bytes: int) -> list[ResponseRecord]:
        """It and what it goes on from, the first one first; `longest` of them at most, and then
        the first one shown still has a `previous`. The same where one was deleted. Raises NotFound,
        and InvalidRequest where all their items are over `most_bytes` as JSON."""
        items = (sa.func.length(sa.cast(each, sa.Text)) for each in (table.input, table.output))
        with self._database.reading() as connection:
            found = [_one(connection, response)]
            ids = _ancestors(connection, response, longest)[1:]
            size = sa.select(sa.func.sum(sum(items))).where(table.id.in_([response, *ids]))
            if connection.execute(size).scalar() > most_bytes:
                raise InvalidRequest(
                    f"What goes before this response is over {most_bytes} bytes "
                    "(gateway.max_body_bytes). Begin anew, with what matters of it as 'input'.",
                    param="previous_response_id",
                    code="context_length_exceeded",
                )
            rows = connection.execute(sa.select(tables.responses).where(table.id.in_(ids), alive()))
            by_id = {row.id: read(row) for row in rows}
        while found[-1].previous in by_id:
            found.append(by_id.pop(found[-1].previous))
        return found[::-1]

    def page(
        self,
        owner: str | None,
        *,
        limit: int,
        after: str | None = None,
        stream: str | None = None,
    ) -> tuple[list[ResponseRecord], bool]:
        """Newest first, without what was asked and answered, and whether there are more. `owner`
        None: of all."""
        wanted = sa.select(*BRIEF).where(alive())
        wanted = wanted.order_by(table.id.desc()).limit(limit + 1)
        if owner is not None:
            wanted = wanted.where(table.owner == owner)
        if stream is not None:
            wanted = wanted.where(table.stream == stream)
        if after is not None:
            wanted = wanted.where(table.id < after)
        with self._database.reading() as connection:
            found = [read(row) for row in connection.execute(wanted)]
        return found[:limit], len(found) > limit

    def ask_cancel(self, response: str) -> ResponseRecord:
        """As it is after that: cancelled where nobody works on it; where somebody does, they see
        `cancel_asked`. One that has ended stays as it is. Raises NotFound."""
        with self._database.writing() as connection:
            found = _one(connection, response, lock=True)
            if found.state.is_final:
                return found
            if found.worker is not None and found.lease_until > time.time():
                return _change(connection, found, cancel_asked=True)
            return self._end(connection, found, ResponseEnd(ResponseState.CANCELLED))

    def cancel_waiting(self, stream: str, limit: int) -> int:
        """Some of a stream that nobody has begun; how many."""
        waiting = sa.select(tables.responses).where(
            table.stream == stream, table.state == ResponseState.QUEUED
        )
        waiting = waiting.order_by(table.id).limit(limit).with_for_update()
        with self._database.writing() as connection:
            rows = connection.execute(waiting).all()
            for row in rows:
                self._end(connection, read(row), ResponseEnd(ResponseState.CANCELLED))
        return len(rows)

    def delete(self, response: str) -> ResponseRecord:
        """Whoever works on it finds its lease lost. Raises NotFound."""
        with self._database.writing() as connection:
            found = _one(connection, response, lock=True)
            _remove(connection, [found.id])
            idempotency.release(connection, found.owner, ROUTE, found.id)
        return found

    # -- what a gateway does that works on them

    def any_waiting(self, without: Sequence[Whose] = ()) -> bool:
        """Whether `claim` would find one."""
        wanted = sa.select(table.id).where(_claimable(), _WHOSE.not_in(without)).limit(1)
        with self._database.reading() as connection:
            return connection.execute(wanted).one_or_none() is not None

    def claim(
        self,
        worker: str,
        lease_s: float,
        limit: int,
        *,
        abandoned: bool = True,
        of: Whose | None = None,
        without: Sequence[Whose] = (),
    ) -> list[ResponseRecord]:
        """Become the worker of those that wait, the oldest first; dead gateways', too, if
        `abandoned`. Only those `of` an owner's model, or none of those `without`."""
        now = time.time()
        with self._database.writing() as connection:
            free = _claimable() if abandoned else table.state == ResponseState.QUEUED
            mine = _WHOSE.not_in(without) if of is None else _WHOSE.in_([of])
            picked = sa.select(table.id).where(free, mine).order_by(table.id).limit(limit)
            ids = list(connection.execute(picked.with_for_update(skip_locked=True)).scalars())
            if not ids:
                return []
            rows = connection.execute(
                tables.responses.update()
                .where(table.id.in_(ids))
                .values(
                    worker=worker,
                    lease_until=now + lease_s,
                    starts=table.starts + 1,
                    state=ResponseState.IN_PROGRESS,
                )
                .returning(*table)
            )
            return sorted((read(row) for row in rows), key=lambda record: record.id)

    def held(self, worker: str) -> dict[str, bool]:
        """What it still works on, and whether that shall be cancelled."""
        wanted = sa.select(table.id, table.cancel_asked).where(
            table.worker == worker, table.state == ResponseState.IN_PROGRESS
        )
        with self._database.reading() as connection:
            return {row.id: row.cancel_asked for row in connection.execute(wanted)}

    def beat(self, worker: str, lease_s: float, responses: Collection[str]) -> None:
        """The worker lives, and works on these."""
        with self._database.writing() as connection:
            connection.execute(
                tables.responses.update()
                .where(
                    table.id.in_(responses),
                    table.worker == worker,
                    table.state == ResponseState.IN_PROGRESS,
                )
                .values(lease_until=time.time() + lease_s)
            )

    def abandon(self, worker: str, responses: Collection[str]) -> None:
        """It works on these no more; that it has tried counts."""
        with self._database.writing() as connection:
            connection.execute(
                tables.responses.update()
                .where(
                    table.id.in_(responses),
                    table.worker == worker,
                    table.state == ResponseState.IN_PROGRESS,
                )
                .values(worker=None, lease_until=0.0)
            )

    def put_back(self, worker: str, response: str, counts: bool = False) -> bool:
        """Its model is away: it waits again. `counts`: an engine was lost over it, so that it was
        tried. False where it shall be cancelled, or is another one's."""
        mine = (table.id == response, table.worker == worker, ~table.cancel_asked)
        return self._release(*mine, counts=counts) == 1

    def release(self, worker: str) -> None:
        """It stops: others may claim what it has. Nobody is to blame, so it counts as no start."""
        self._release(table.worker == worker)

    def _release(self, *which: sa.ColumnElement[bool], counts: bool = False) -> int:
        fewer = sa.case((table.starts > 0, table.starts - 1), else_=0)
        with self._database.writing() as connection:
            return connection.execute(
                tables.responses.update()
                .where(*which, table.state == ResponseState.IN_PROGRESS)
                .values(
                    worker=None,
                    lease_until=0.0,
                    state=ResponseState.QUEUED,
                    starts=table.starts if counts else fewer,
                )
            ).rowcount

    def tell(self, record: ResponseRecord, events: list[bytes]) -> ResponseRecord:
        """As its worker: more events for its log, in JSON. `record` as it was before them: what
        another try has written already is not written again. Raises LeaseLost."""
        with self._database.writing() as connection:
            found = replace(record, told=_told(connection, record))
            events = events[found.told - record.told :]
            if not events:
                return found
            _log(connection, found, events)
            return _change(connection, found, told=found.told + len(events))

    def end(
        self, record: ResponseRecord, end: ResponseEnd, events: list[bytes] | None = None
    ) -> ResponseRecord:
        """As its worker: it is over, and these were its last events. Raises LeaseLost."""
        with self._database.writing() as connection:
            found = replace(record, told=_told(connection, record))
            events = (events or [])[found.told - record.told :]
            if events:
                _log(connection, found, events)
                found = replace(found, told=found.told + len(events))
            return self._end(connection, found, end)

    def _end(
        self, connection: sa.Connection, found: ResponseRecord, end: ResponseEnd
    ) -> ResponseRecord:
        ended = _change(
            connection, found, **end.of(found), told=found.told, ended_at=time.time(),
            worker=None, lease_until=0.0,
        )  # fmt: skip
        self._publish(connection, ended)
        return ended

    def _publish(self, connection: sa.Connection, ended: ResponseRecord) -> None:
        """It has ended: its conversation goes on with it, and the feed tells it."""
        good = ended.state in (ResponseState.COMPLETED, ResponseState.INCOMPLETE)
        if ended.conversation is not None and good:
            conversations.append(connection, ended.conversation, [*ended.input, *ended.output])
        # Entries come in the order of their serials. Last, since all who end one wait here.
        self._database.alone(connection, Lock.FEED)
        connection.execute(
            tables.feed.insert().values(owner=ended.owner, stream=ended.stream, response=ended.id)
        )

    # -- cleaning up

    def sweep(self, now: float, limit: int = 500) -> int:
        """Forget some of those that have expired; how many. One that is still worked on stays."""
        ended = table.state.not_in(_OPEN)
        wanted = sa.select(table.id, table.owner).where(table.expires_at <= now, ended).limit(limit)
        with self._database.writing() as connection:
            rows = connection.execute(wanted).all()
            _remove(connection, [row.id for row in rows])
            for row in rows:
                idempotency.release(connection, row.owner, ROUTE, row.id)
        return len(rows)


def no_response(response: str) -> NotFound:
    return NotFound(f"Response with id '{response[:100]}' not found.", param="response_id")


def _claimable() -> sa.ColumnElement[bool]:
    abandoned = sa.and_(
        table.state == ResponseState.IN_PROGRESS,
        table.background,
        sa.or_(table.worker.is_(None), table.lease_until < time.time()),
    )
    return sa.or_(table.state == ResponseState.QUEUED, abandoned)


def _one(connection: sa.Connection, response: str, lock: bool = False) -> ResponseRecord:
    if "\0" in response:  # PostgreSQL knows no such text
        raise no_response(response)
    wanted = sa.select(tables.responses).where(table.id == response, alive())
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_response(response)
    return read(row)


def _told(connection: sa.Connection, record: ResponseRecord) -> int:
    """How many events are in its log, for its worker alone. Raises LeaseLost."""
    wanted = sa.select(table.worker, table.state, table.told).where(table.id == record.id)
    row = connection.execute(wanted.with_for_update()).one_or_none()
    if row is None or row.worker != record.worker or ResponseState(row.state).is_final:
        raise LeaseLost(f"another gateway works on {record.id}, or it has ended")
    return row.told


def _change(connection: sa.Connection, found: ResponseRecord, **values: Any) -> ResponseRecord:
    connection.execute(tables.responses.update().where(table.id == found.id).values(values))
    return replace(found, **values)


def _log(connection: sa.Connection, found: ResponseRecord, events: list[bytes]) -> None:
    connection.execute(
        tables.response_events.insert().values(
            response=found.id,
            first=found.told,
            last=found.told + len(events) - 1,
            events=b"\n".join(events).decode(),
        )
    )


def _keep_chain(connection: sa.Connection, record: ResponseRecord) -> None:
    """What it goes on from lives as long as itself."""
    assert record.previous is not None
    ids = _ancestors(connection, record.previous, longest=10_000)
    longer = KEPT_LONGER * (record.expires_at - record.created_at)
    connection.execute(
        tables.responses.update()
        .where(table.id.in_(ids), table.expires_at < record.expires_at)
        .values(expires_at=record.expires_at + longer)
    )


def _ancestors(connection: sa.Connection, response: str, longest: int) -> list[str]:
    """It first."""
    walk = (
        sa.select(table.id, table.previous, sa.literal(1).label("depth"))
        .where(table.id == response)
        .cte("walk", recursive=True)
    )
    older = tables.responses.alias()
    step = sa.select(older.c.id, older.c.previous, walk.c.depth + 1)
    step = step.join(walk, older.c.id == walk.c.previous).where(walk.c.depth < longest)
    walk = walk.union_all(step)
    rows = connection.execute(sa.select(walk.c.id).order_by(walk.c.depth))
    return list(rows.scalars())


def _check_room(connection: sa.Connection, owner: str, most: int) -> None:
    wanted = sa.select(sa.func.count()).where(table.owner == owner, table.state.in_(_OPEN))
    if (connection.execute(wanted).scalar() or 0) >= most:
        raise Overloaded(
            f"{most} of your responses in the background have not ended, the most that may wait "
            "(responses.max_open). Retry later.",
            retry_after=5,
        )


def _check_stream(connection: sa.Connection, stream: str) -> None:
    """It stays open until this transaction has ended."""
    wanted = sa.select(tables.streams.c.state).where(tables.streams.c.id == stream)
    state = connection.execute(wanted.with_for_update(read=True)).scalar()
    if state != StreamState.OPEN:
        raise Conflict(
            f"The stream is {state}: nothing new can be put into it.",
            param="stream_id",
            code="stream_not_open",
        )


def _remove(connection: sa.Connection, ids: Iterable[str]) -> None:
    ids = list(ids)
    connection.execute(tables.feed.delete().where(feed.response.in_(ids)))
    connection.execute(tables.response_events.delete().where(log.response.in_(ids)))
    connection.execute(tables.responses.delete().where(table.id.in_(ids)))
