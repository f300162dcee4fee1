"""Batches as records: one state machine, and never more than one process that works on a batch.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │  │            │              │
        │  │            └──────────────┴─ cancel ─▶ cancelling ──▶ cancelled
        │  └─ cancel ─▶ cancelling
        └──▶ failed ◀── any state, where its job cannot go on

Clients `create` and `ask_cancel`. A job `claim`s the batch: it is the worker until its lease ends,
and whatever it writes is refused once another one has claimed it. A row counts as finished when the
part that holds it is added, in one transaction with the counts.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, LeaseLost, NotFound
from llm_engine.records import BatchOptions, BatchPart, BatchRecord, FileRecord, Usage
from llm_engine.statuses import BatchState
from llm_engine.store import files, journal, tables
from llm_engine.store.database import Database, Lock

table = tables.batches.c
FINAL = tuple(str(state) for state in BatchState if state.is_final)
_CANCELLABLE = (BatchState.VALIDATING, BatchState.IN_PROGRESS, BatchState.FINALIZING)


class Batches:
    def __init__(self, database: Database) -> None:
        self._database = database

    # -- what clients ask for

    def create(self, record: BatchRecord, limit: int) -> None:
        """Raises Conflict where its owner has `limit` batches that have not ended."""
        with self._database.writing(alone=Lock.BATCHES) as connection:
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
            if record.state not in _CANCELLABLE:
                raise Conflict(
                    f"Cannot cancel a batch with status '{record.state}'.", code="batch_ended"
                )
            return _move(connection, record, BatchState.CANCELLING, outcome="cancelled")

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
            found = _one(connection, record.id, lock=True)
            if found.worker != record.worker or record.worker is None:
                raise LeaseLost(f"another process works on {record.id}")
            return _move(connection, found, to, **values) if found.state in from_ else None

    def note(self, record: BatchRecord, **values: Any) -> BatchRecord:
        """As its worker: other columns (`reason`, `model`, `total`, ...). Raises LeaseLost."""
        with self._database.writing() as connection:
            return _as_worker(connection, record, _plain(values))

    def add_part(self, record: BatchRecord, part: BatchPart) -> BatchRecord:
        """As its worker: these rows are finished, in any state but a final one. Raises LeaseLost,
        and NotFound where the batch is gone."""
        with self._database.writing() as connection:
            found = _one(connection, record.id, lock=True)
            if found.worker != record.worker or found.state.is_final:
                raise LeaseLost(f"another process works on {record.id}")
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

        The parts are forgotten; whoever calls deletes their objects after that. Raises LeaseLost.
        """
        with self._database.writing() as connection:
            found = _one(connection, record.id, lock=True)
            if found.worker != record.worker or found.state.is_final:
                raise LeaseLost(f"another process works on {record.id}")
            for result in results:
                files.insert(connection, result)
            connection.execute(
                tables.batch_parts.delete().where(tables.batch_parts.c.batch == record.id)
            )
            return _move(connection, found, to, worker=None, lease_until=0.0, **values)

    # -- what the keeper of all batches does

    def open(self) -> list[BatchRecord]:
        """All that have not ended, oldest first."""
        wanted = sa.select(tables.batches).where(table.state.not_in(FINAL)).order_by(table.id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(wanted)]

    def release(self, record: BatchRecord, reason: str) -> bool:
        """Its worker is known to be dead: another may claim it at once. False where that was
        another worker."""
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
            found = _one(connection, record.id, lock=True)
            alive = found.worker is not None and found.lease_until > time.time()
            if alive or found.state.is_final:
                return None
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
            table.worker == record.worker,
            table.state.not_in(FINAL),
        )
        .values(values)
        .returning(*table)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"another process works on {record.id}, or it has ended")
    return _record(row)


def _one(connection: sa.Connection, batch: str, lock: bool = False) -> BatchRecord:
    wanted = sa.select(tables.batches).where(table.id == batch)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_batch(batch)
    return _record(row)


def no_batch(batch: str) -> NotFound:
    return NotFound(f"No batch found with id '{batch}'.", param="batch_id")


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
