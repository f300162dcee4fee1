"""Records that a job works on, and never more than one process at a time.

A job `claim`s a record: it is the worker until its lease ends, and whatever it writes is refused
once another one has claimed it, or the record has come to an end.
"""

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import sqlalchemy as sa

from llm_engine.errors import LeaseLost, NotFound
from llm_engine.records import BatchRecord, FineTuneRecord
from llm_engine.store import journal
from llm_engine.store.database import Database

Record = TypeVar("Record", BatchRecord, FineTuneRecord)


class Leased(Generic[Record]):
    """Of one kind; the classes that derive from it name the table and tell how rows are read."""

    KIND: ClassVar[str]  # in the journal
    TABLE: ClassVar[sa.Table]
    FINAL: ClassVar[tuple[str, ...]]  # states that end it
    RESTS: ClassVar[tuple[str, ...]] = ()  # states, not final, that no job may claim it in

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, record: str) -> Record:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return self._one(connection, record)

    def page(
        self, owner: str | None, after: str | None, limit: int, *wanted: sa.ColumnElement[bool]
    ) -> tuple[list[Record], bool]:
        """Newest first, and whether there are more. `owner` None: of all. Raises NotFound where
        there is no record `after`."""
        table = self.TABLE.c
        rows = sa.select(self.TABLE).where(*wanted).order_by(table.id.desc()).limit(limit + 1)
        if owner is not None:
            rows = rows.where(table.owner == owner)
        with self._database.reading() as connection:
            if after is not None:
                cursor = self._one(connection, after)
                if owner is not None and cursor.owner != owner:
                    raise self._missing(after)
                rows = rows.where(table.id < after)
            found = [self._read(row) for row in connection.execute(rows)]
        return found[:limit], len(found) > limit

    # -- what its job does

    def claim(self, record: str, worker: str, lease_s: float) -> Record:
        """Become its worker. Raises LeaseLost where another one is alive, it rests or has ended."""
        table, now = self.TABLE.c, time.time()
        with self._database.writing() as connection:
            row = connection.execute(
                self.TABLE.update()
                .where(
                    table.id == record,
                    table.state.not_in(self.FINAL + self.RESTS),
                    sa.or_(table.worker.is_(None), table.lease_until < now),
                )
                .values(
                    worker=worker,
                    lease_until=now + lease_s,
                    starts=table.starts + 1,
                    idle_starts=table.idle_starts + 1,
                    reason=None,  # it waits for nothing any more
                    revision=table.revision + 1,
                )
                .returning(*table)
            ).one_or_none()
            if row is None:
                raise LeaseLost(f"{record} has ended, or another process works on it")
            journal.note(connection, record, f"{self.KIND}.claimed", worker)
            return self._read(row)

    def beat(
        self, record: Record, lease_s: float, progress: dict[str, float] | None = None
    ) -> Record:
        """The worker lives. The record as it is now: it may have been cancelled. Raises LeaseLost.

        Not a change of the record: `revision` stays.
        """
        values: dict[str, Any] = {"lease_until": time.time() + lease_s}
        if progress is not None:
            values["progress"] = progress
        with self._database.writing() as connection:
            return self._as_worker(connection, record, values)

    def note(self, record: Record, **values: Any) -> Record:
        """As its worker: other columns. Raises LeaseLost."""
        with self._database.writing() as connection:
            return self._as_worker(connection, record, self._plain(values))

    def leave(self, record: Record, reason: str | None, tried: bool) -> None:
        """As its worker: another may claim it. `tried` False: it had no chance to get anywhere,
        which does not count. Raises LeaseLost."""
        values: dict[str, Any] = {"worker": None, "lease_until": 0.0, "reason": reason}
        with self._database.writing() as connection:
            found = self._held(connection, record)
            if not tried:
                values["idle_starts"] = max(0, found.idle_starts - 1)
            journal.note(connection, record.id, f"{self.KIND}.interrupted", reason)
            self._update(connection, found, values)

    # -- what the keeper of all of them does

    def open(self) -> list[Record]:
        """All that have not ended, oldest first."""
        table = self.TABLE.c
        wanted = sa.select(self.TABLE).where(table.state.not_in(self.FINAL)).order_by(table.id)
        with self._database.reading() as connection:
            return [self._read(row) for row in connection.execute(wanted)]

    def release(self, record: Record, reason: str) -> bool:
        """Its worker is known to be dead: another may claim it at once. False where that was
        another worker."""
        if record.worker is None:
            return False
        table = self.TABLE.c
        with self._database.writing() as connection:
            done = connection.execute(
                self.TABLE.update()
                .where(table.id == record.id, table.worker == record.worker)
                .values(worker=None, lease_until=0.0, revision=table.revision + 1)
            )
            if done.rowcount:
                journal.note(connection, record.id, f"{self.KIND}.interrupted", reason)
            return bool(done.rowcount)

    def say(self, record: Record, reason: str | None) -> None:
        """What it waits for."""
        table = self.TABLE.c
        with self._database.writing() as connection:
            connection.execute(
                self.TABLE.update()
                .where(table.id == record.id, table.state.not_in(self.FINAL))
                .values(reason=reason)
            )

    # -- for those who derive

    def _read(self, row: sa.Row) -> Record:
        raise NotImplementedError

    def _missing(self, record: str) -> NotFound:
        raise NotImplementedError

    def _plain(self, values: dict[str, Any]) -> dict[str, Any]:
        """As the columns have them."""
        return values

    def _one(self, connection: sa.Connection, record: str, lock: bool = False) -> Record:
        if "\0" in record:  # PostgreSQL knows no such text
            raise self._missing(record)
        wanted = sa.select(self.TABLE).where(self.TABLE.c.id == record)
        row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
        if row is None:
            raise self._missing(record)
        return self._read(row)

    def _held(self, connection: sa.Connection, record: Record) -> Record:
        """As its worker: as it is now, and for this transaction only. Raises LeaseLost."""
        wanted = sa.select(self.TABLE).where(self.TABLE.c.id == record.id).with_for_update()
        row = connection.execute(wanted).one_or_none()
        found = None if row is None else self._read(row)
        if found is None or found.worker != _worker(record) or found.state.is_final:
            raise _lost(record)
        return found

    def _without_worker(self, connection: sa.Connection, record: Record) -> Record | None:
        """As it is now, and for this transaction only; None where it has one, or has ended."""
        found = self._one(connection, record.id, lock=True)
        alive = found.worker is not None and found.lease_until > time.time()
        return None if alive or found.state.is_final else found

    def _as_worker(
        self, connection: sa.Connection, record: Record, values: dict[str, Any]
    ) -> Record:
        table = self.TABLE.c
        row = connection.execute(
            self.TABLE.update()
            .where(
                table.id == record.id,
                table.worker == _worker(record),
                table.state.not_in(self.FINAL),
            )
            .values(values)
            .returning(*table)
        ).one_or_none()
        if row is None:
            raise _lost(record)
        return self._read(row)

    def _move(self, connection: sa.Connection, found: Record, to: Any, **values: Any) -> Record:
        times = found.times | {str(to): time.time()}
        journal.note(connection, found.id, str(to), values.get("reason"))
        values = {"state": str(to), "times": times} | self._plain(values)
        return self._update(connection, found, values)

    def _update(self, connection: sa.Connection, found: Record, values: dict[str, Any]) -> Record:
        table = self.TABLE.c
        changed = self.TABLE.update().where(table.id == found.id)
        row = connection.execute(
            changed.values(**values, revision=table.revision + 1).returning(*table)
        ).one()
        return self._read(row)

    def _open_ones(self, connection: sa.Connection, owner: str, besides: Sequence[str] = ()) -> int:
        """How many of an owner have not ended."""
        table = self.TABLE.c
        states = self.FINAL + tuple(besides)
        wanted = sa.select(sa.func.count()).where(table.owner == owner, table.state.not_in(states))
        return connection.execute(wanted).scalar() or 0


def _worker(record: BatchRecord | FineTuneRecord) -> str:
    if record.worker is None:  # nobody's record is not everybody's
        raise _lost(record)
    return record.worker


def _lost(record: BatchRecord | FineTuneRecord) -> LeaseLost:
    return LeaseLost(f"another process works on {record.id}, or it has ended")
