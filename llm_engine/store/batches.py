"""Batches as records: one state machine, and never more than one process that works on a batch.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │              │               │
        └──────────────┴───────────────┴─ cancel ─▶ cancelling ──▶ cancelled

    each of these that has not ended ──▶ failed, where its job cannot go on

Clients `create` and `ask_cancel`. A job `claim`s the batch: it is the worker until its lease ends,
and whatever it writes is refused once another one has claimed it. A row counts as finished when the
part that holds it is added, in one transaction with the counts. A batch that is cancelled before
any job has begun it goes straight to its end.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.records import BatchOptions, BatchPart, BatchRecord, FileRecord, Usage
from llm_engine.statuses import BatchState
from llm_engine.store import files, idempotency, journal, tables
from llm_engine.store.database import Lock
from llm_engine.store.idempotency import Once
from llm_engine.store.leased import Leased

ROUTE = "batches"  # of the idempotency keys that make them


class Batches(Leased[BatchRecord]):
    KIND = "batch"
    TABLE = tables.batches
    FINAL = tuple(str(state) for state in BatchState if state.is_final)

    # -- what clients ask for

    def create(self, record: BatchRecord, limit: int, once: Once | None = None) -> BatchRecord:
        """The record, or what `once` has made before. Raises Conflict where its owner has `limit`
        batches that have not ended, and where `once` was something else."""
        with self._database.writing(alone=Lock.BATCHES) as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return self._one(connection, first)
            if self._open_ones(connection, record.owner) >= limit:
                raise Conflict(
                    f"You have {limit} batches that have not ended, the most at a time "
                    "(batches.max_open). Wait for one, or cancel one.",
                    code="too_many_batches",
                    status=429,
                )
            connection.execute(tables.batches.insert().values(_values(record)))
            journal.note(connection, record.id, str(record.state))
            return self._one(connection, record.id)

    def ask_cancel(self, batch: str) -> BatchRecord:
        """Its finished rows stay. Again does nothing. Raises NotFound; Conflict once it ended."""
        with self._database.writing() as connection:
            record = self._one(connection, batch, lock=True)
            if record.state in (BatchState.CANCELLING, BatchState.CANCELLED):
                return record
            if record.state.is_final:
                raise Conflict(
                    f"Cannot cancel a batch with status '{record.state}'.", code="batch_ended"
                )
            outcome = str(BatchState.CANCELLED)
            return self._move(connection, record, BatchState.CANCELLING, outcome=outcome)

    # -- what its job does

    def move(
        self, record: BatchRecord, from_: Sequence[BatchState], to: BatchState, **values: Any
    ) -> BatchRecord | None:
        """As its worker: the next state. None where it was in none of `from_`, because somebody
        has cancelled it. Raises LeaseLost. `values`: other columns, as the record has them."""
        with self._database.writing() as connection:
            found = self._held(connection, record)
            if found.state not in from_:
                return None
            return self._move(connection, found, to, **values)

    def add_part(self, record: BatchRecord, part: BatchPart) -> BatchRecord:
        """As its worker: these rows are finished, in any state but a final one. Raises LeaseLost.

        Again does nothing: a worker that did not hear the answer may ask once more.
        """
        with self._database.writing() as connection:
            found = self._held(connection, record)
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
            return self._update(connection, found, changes)

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
            found = self._held(connection, record)
            if found.state is BatchState.CANCELLING and to is not BatchState.FAILED:
                to = BatchState.CANCELLED
            for result in results:
                files.insert(connection, result)
            return self._end(connection, found, to, **values)

    # -- what the keeper of all batches does

    def open_files(self) -> set[str]:
        """The ids of files that those which have not ended read, or are putting together."""
        table = tables.batches.c
        wanted = sa.select(table.input_file_id, table.output_file_id, table.error_file_id).where(
            table.state.not_in(self.FINAL)
        )
        with self._database.reading() as connection:
            return {file for row in connection.execute(wanted) for file in row if file}

    def end(self, record: BatchRecord, to: BatchState, **values: Any) -> BatchRecord | None:
        """Without a worker: a batch that no job can bring to its end. None where it has one."""
        with self._database.writing() as connection:
            found = self._without_worker(connection, record)
            return None if found is None else self._end(connection, found, to, **values)

    def conclude(self, record: BatchRecord, **values: Any) -> BatchRecord | None:
        """Without a worker: no more of its rows run, and the next job makes results of those that
        have. None where it has a worker, or has come further than its rows."""
        values |= {"outcome": str(BatchState.COMPLETED), "idle_starts": 0}
        with self._database.writing() as connection:
            found = self._without_worker(connection, record)
            if found is None or found.state is not BatchState.IN_PROGRESS:
                return None
            to = BatchState.FINALIZING
            return self._move(connection, found, to, worker=None, lease_until=0.0, **values)

    # -- inside

    def _read(self, row: sa.Row) -> BatchRecord:
        values = dict(row._mapping)
        values["state"] = BatchState(values["state"])
        values["usage"] = Usage(**values["usage"])
        values["options"] = BatchOptions(**values["options"])
        return BatchRecord(**values)

    def _missing(self, record: str) -> NotFound:
        return no_batch(record)

    def _plain(self, values: dict[str, Any]) -> dict[str, Any]:
        if isinstance(values.get("usage"), Usage):
            values = values | {"usage": asdict(values["usage"])}
        return values

    def _end(
        self, connection: sa.Connection, found: BatchRecord, to: BatchState, **values: Any
    ) -> BatchRecord:
        parts = tables.batch_parts
        connection.execute(parts.delete().where(parts.c.batch == found.id))
        return self._move(connection, found, to, worker=None, lease_until=0.0, **values)


def _has_part(connection: sa.Connection, batch: str, part: BatchPart) -> bool:
    parts = tables.batch_parts.c
    wanted = sa.select(parts.key).where(parts.batch == batch, parts.number == part.number)
    return connection.execute(wanted).scalar() == part.key


def no_batch(batch: str) -> NotFound:
    return NotFound(f"No batch found with id '{batch[:100]}'.", param="batch_id")


def _values(record: BatchRecord) -> dict[str, Any]:
    values = asdict(record)
    return values | {
        "state": str(record.state),
        "times": {str(record.state): record.created_at, **record.times},
    }
