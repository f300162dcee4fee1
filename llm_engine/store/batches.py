"""Batches as records: one state machine, and never more than one process that works on a batch.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │              │               │
        └──────────────┴───────────────┴─ cancel ─▶ cancelling ──▶ cancelled

    each of these that has not ended ──▶ failed, where its job cannot go on

Clients `create` and `ask_cancel`. A job `claim`s the batch: it is the worker until its lease ends,
and whatever it writes is refused once another one has claimed it. A row counts as finished when the
part that holds it is added, in one transaction with the counts. A batch whose time is over before
any job has begun it goes straight to its end.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, LeaseLost, NotFound
from llm_engine.records import BatchOptions, BatchPart, BatchRecord, FileRecord, Usage
from llm_engine.statuses import BatchState
from llm_engine.store import files, idempotency, journal, tables
from llm_engine.store.database import Database, Lock
from llm_engine.store.idempotency import Once

table = tables.batches.c
ROUTE = "batches"  # of the idempotency keys that make them
FINAL = tuple(str(state) for state in BatchState if state.is_final)


class Batches:
    def __init__(self, database: Database) -> None:
        self._database = database

    # -- what clients ask for

    def create(self, record: BatchRecord, limit: int, once: Once | None = None) -> BatchRecord:
        """The record, or what `once` has made before. Raises Conflict where its owner has `limit`
        batches that have not ended, and where `once` was something else."""
        with self._database.writing(alone=Lock.BATCHES) as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return _one(connection, first)
            open_ones = sa.select(sa.func.count()).where(
                table.owner == record.owner, table.state.not_in(FINAL)
            )
            if (connection.execute(open_ones).scalar() or 0) >= limit:
                raise Conflict(
                    f"You have {limit} batches that have not ended, the most at a time "
                    "(batches.max_open). Wait for one, or cancel one.",
                    code="too_many_batches",
                    status=429,
                )
            connection.execute(tables.batches.insert().values(_values(record)))
            journal.note(connection, record.id, str(record.state))
            return _one(connection, record.id)

    def get(self, batch: str) -> BatchRecord:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, batch)

    def page(
        self, owner: str | None, after: str | None, limit: int
    ) -> tuple[list[BatchRecord], bool]:
        """Newest first, and whether there are more. `owner` None: of all. Raises NotFound where
        there is no batch `after`."""
        wanted = sa.select(tables.batches).order_by(table.id.desc()).limit(limit + 1)
        if owner is not None:
            wanted = wanted.where(table.owner == owner)
        with self._database.reading() as connection:
            if after is not None:
                cursor = _one(connection, after)
                if owner is not None and cursor.owner != owner:
                    raise no_batch(after)
                wanted = wanted.where(table.id < after)
            found = [_record(row) for row in connection.execute(wanted)]
        return found[:limit], len(found) > limit

    def ask_cancel(self, batch: str) -> BatchRecord:
        """Its finished rows stay. Again does nothing. Raises NotFound; Conflict once it ended."""
        with self._database.writing() as connection:
            record = _one(connection, batch, lock=True)
            if record.state in (BatchState.CANCELLING, BatchState.CANCELLED):
                return record
            if record.state.is_final:
                raise Conflict(
                    f"Cannot cancel a batch with status '{record.state}'.", code="batch_ended"
                )
            outcome = str(BatchState.CANCELLED)
            return _move(connection, record, BatchState.CANCELLING, outcome=outcome)

    # -- what its job does

    def claim(self, batch: str, worker: str, lease_s: float) -> BatchRecord:
        """Become its worker. Raises LeaseLost where another one is alive, or it has ended."""
        now = time.time()
        with self._database.writing() as connection:
            row = connection.execute(
                tables.batches.update()
                .where(
                    table.id == batch,
                    table.state.not_in(FINAL),
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
                raise LeaseLost(f"{batch} has ended, or another process works on it")
            journal.note(connection, batch, "batch.claimed", worker)
            return _record(row)

    def beat(
        self, record: BatchRecord, lease_s: float, progress: dict[str, float] | None = None
    ) -> BatchRecord:
        """The worker lives. The record as it is now: it may have been cancelled. Raises LeaseLost.

        Not a change of the record: `revision` stays.
        """
        values: dict[str, Any] = {"lease_until": time.time() + lease_s}
        if progress is not None:
            values["progress"] = progress
        with self._database.writing() as connection:
            return _as_worker(connection, record, values)

    def move(
        self, record: BatchRecord, from_: Sequence[BatchState], to: BatchState, **values: Any
    ) -> BatchRecord | None:
        """As its worker: the next state. None where it was in none of `from_`, because somebody
        has cancelled it. Raises LeaseLost. `values`: other columns, as the record has them."""
        with self._database.writing() as connection:
            found = _held(connection, record)
            return _move(connection, found, to, **values) if found.state in from_ else None

    def note(self, record: BatchRecord, **values: Any) -> BatchRecord:
        """As its worker: other columns (`reason`, `model`, `total`, ...). Raises LeaseLost."""
        with self._database.writing() as connection:
            return _as_worker(connection, record, _plain(values))

    def add_part(self, record: BatchRecord, part: BatchPart) -> BatchRecord:
        """As its worker: these rows are finished, in any state but a final one. Raises LeaseLost.

        Again does nothing: a worker that did not hear the answer may ask once more.
        """
        with self._database.writing() as connection:
            found = _held(connection, record)
            if _has_part(connection, record.id, part):
                return found
            connection.execute(
                tables.batch_parts.insert().values(
                    batch=record.id,
                    number=part.number,
                    key=part.key,
                    rows=list(part.rows),
                    failed=part.failed,
                    usage=asdict(part.usage),
                )
            )
            changes = {
                "completed": found.completed + len(part.rows) - part.failed,
                "failed": found.failed + part.failed,
                "usage": asdict(found.usage + part.usage),
                "idle_starts": 0,
            }
            return _update(connection, found, changes)

    def parts(self, batch: str) -> list[BatchPart]:
        """In the order in which they were added."""
        parts = tables.batch_parts.c
        wanted = sa.select(tables.batch_parts).where(parts.batch == batch).order_by(parts.number)
        with self._database.reading() as connection:
            return [
                BatchPart(row.number, row.key, tuple(row.rows), row.failed, Usage(**row.usage))
                for row in connection.execute(wanted)
            ]

    def finish(
        self, record: BatchRecord, to: BatchState, results: Sequence[FileRecord], **values: Any
    ) -> BatchRecord:
        """As its worker: the end. Its files and its last state become visible together.

        Who has asked to cancel it in the meantime was promised that it ends as cancelled: it does,
        unless it failed. The parts are forgotten; whoever calls deletes their objects after that.
        Raises LeaseLost.
        """
        with self._database.writing() as connection:
            found = _held(connection, record)
            if found.state is BatchState.CANCELLING and to is not BatchState.FAILED:
                to = BatchState.CANCELLED
            for result in results:
                files.insert(connection, result)
            return _end(connection, found, to, **values)

    def leave(self, record: BatchRecord, reason: str) -> None:
        """As its worker: another may claim it, and has as many tries as this one had, unless its
        time is over. Raises LeaseLost."""
        values: dict[str, Any] = {"worker": None, "lease_until": 0.0, "reason": reason}
        with self._database.writing() as connection:
            found = _held(connection, record)
            if found.expires_at > time.time():
                values["idle_starts"] = max(0, found.idle_starts - 1)
            journal.note(connection, record.id, "batch.interrupted", reason)
            _update(connection, found, values)

    # -- what the keeper of all batches does

    def open(self) -> list[BatchRecord]:
        """All that have not ended, oldest first."""
        wanted = sa.select(tables.batches).where(table.state.not_in(FINAL)).order_by(table.id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(wanted)]

    def release(self, record: BatchRecord, reason: str) -> bool:
        """Its worker is known to be dead: another may claim it at once. False where that was
        another worker."""
        if record.worker is None:
            return False
        with self._database.writing() as connection:
            done = connection.execute(
                tables.batches.update()
                .where(table.id == record.id, table.worker == record.worker)
                .values(worker=None, lease_until=0.0, revision=table.revision + 1)
            )
            if done.rowcount:
                journal.note(connection, record.id, "batch.interrupted", reason)
            return bool(done.rowcount)

    def end(self, record: BatchRecord, to: BatchState, **values: Any) -> BatchRecord | None:
        """Without a worker: a batch that no job can bring to its end. None where it has one."""
        with self._database.writing() as connection:
            found = _without_worker(connection, record)
            return None if found is None else _end(connection, found, to, **values)

    def conclude(self, record: BatchRecord, **values: Any) -> BatchRecord | None:
        """Without a worker: no more of its rows run, and the next job makes results of those that
        have. None where it has a worker, or has come further than its rows."""
        values |= {"outcome": str(BatchState.COMPLETED), "idle_starts": 0}
        with self._database.writing() as connection:
            found = _without_worker(connection, record)
            if found is None or found.state is not BatchState.IN_PROGRESS:
                return None
            to = BatchState.FINALIZING
            return _move(connection, found, to, worker=None, lease_until=0.0, **values)

    def say(self, record: BatchRecord, reason: str | None) -> None:
        """What it waits for."""
        with self._database.writing() as connection:
            connection.execute(
                tables.batches.update()
                .where(table.id == record.id, table.state.not_in(FINAL))
                .values(reason=reason)
            )


def _move(
    connection: sa.Connection, found: BatchRecord, to: BatchState, **values: Any
) -> BatchRecord:
    times = found.times | {str(to): time.time()}
    journal.note(connection, found.id, str(to), values.get("reason"))
    return _update(connection, found, {"state": str(to), "times": times} | _plain(values))


def _end(
    connection: sa.Connection, found: BatchRecord, to: BatchState, **values: Any
) -> BatchRecord:
    parts = tables.batch_parts
    connection.execute(parts.delete().where(parts.c.batch == found.id))
    return _move(connection, found, to, worker=None, lease_until=0.0, **values)


def _without_worker(connection: sa.Connection, record: BatchRecord) -> BatchRecord | None:
    """As it is now, and for this transaction only; None where it has one, or has ended."""
    found = _one(connection, record.id, lock=True)
    alive = found.worker is not None and found.lease_until > time.time()
    return None if alive or found.state.is_final else found


def _update(connection: sa.Connection, found: BatchRecord, values: dict[str, Any]) -> BatchRecord:
    changed = tables.batches.update().where(table.id == found.id)
    row = connection.execute(
        changed.values(**values, revision=table.revision + 1).returning(*table)
    ).one()
    return _record(row)


def _as_worker(
    connection: sa.Connection, record: BatchRecord, values: dict[str, Any]
) -> BatchRecord:
    row = connection.execute(
        tables.batches.update()
        .where(
            table.id == record.id,
            table.worker == _worker(record),
            table.state.not_in(FINAL),
        )
        .values(values)
        .returning(*table)
    ).one_or_none()
    if row is None:
        raise _lost(record)
    return _record(row)


def _held(connection: sa.Connection, record: BatchRecord) -> BatchRecord:
    """As it is now, and for this transaction only. Raises LeaseLost."""
    wanted = sa.select(tables.batches).where(table.id == record.id).with_for_update()
    row = connection.execute(wanted).one_or_none()
    found = None if row is None else _record(row)
    if found is None or found.worker != _worker(record) or found.state.is_final:
        raise _lost(record)
    return found


def _worker(record: BatchRecord) -> str:
    if record.worker is None:  # nobody's record is not everybody's
        raise _lost(record)
    return record.worker


def _lost(record: BatchRecord) -> LeaseLost:
    return LeaseLost(f"another process works on {record.id}, or it has ended")


def _has_part(connection: sa.Connection, batch: str, part: BatchPart) -> bool:
    parts = tables.batch_parts.c
    wanted = sa.select(parts.key).where(parts.batch == batch, parts.number == part.number)
    return connection.execute(wanted).scalar() == part.key


def _one(connection: sa.Connection, batch: str, lock: bool = False) -> BatchRecord:
    if "\0" in batch:  # PostgreSQL knows no such text
        raise no_batch(batch)
    wanted = sa.select(tables.batches).where(table.id == batch)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_batch(batch)
    return _record(row)


def no_batch(batch: str) -> NotFound:
    return NotFound(f"No batch found with id '{batch[:100]}'.", param="batch_id")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("usage"), Usage):
        values = values | {"usage": asdict(values["usage"])}
    return values


def _values(record: BatchRecord) -> dict[str, Any]:
    values = asdict(record)
    return values | {
        "state": str(record.state),
        "times": {str(record.state): record.created_at, **record.times},
    }


def _record(row: sa.Row) -> BatchRecord:
    values = dict(row._mapping)
    values["state"] = BatchState(values["state"])
    values["usage"] = Usage(**values["usage"])
    values["options"] = BatchOptions(**values["options"])
    return BatchRecord(**values)
