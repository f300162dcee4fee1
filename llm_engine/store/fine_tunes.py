"""Fine-tunes as records: one state machine, and never more than one process that works on one.

    validating_files ──▶ queued ──▶ running ──▶ succeeded
                           ▲           │
                           └─ resume ─ paused ◀── pause (of a queued one, too)

    each of these that has not ended ──▶ cancelled, at once, where its owner asks for it
                                     ──▶ failed, where its files are bad or its job cannot go on

Clients `create`, `ask_cancel`, `pause` and `resume`. A job `claim`s the fine-tune (see `leased`);
what it has trained is durable once a checkpoint is `kept`, together with its metrics and events.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.records import AdapterRecord, FileRecord, FineTuneEvent, FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.store import adapters, files, idempotency, journal, tables
from llm_engine.store.database import Lock
from llm_engine.store.idempotency import Once
from llm_engine.store.leased import Leased

ROUTE = "fine_tunes"  # of the idempotency keys that make them
MOST_EVENTS = 20_000  # of one fine-tune; the oldest go

_S = FineTuneState
_PAUSABLE = (_S.VALIDATING, _S.QUEUED, _S.RUNNING)


class FineTunes(Leased[FineTuneRecord]):
    KIND = "fine_tune"
    TABLE = tables.fine_tunes
    FINAL = tuple(str(state) for state in FineTuneState if state.is_final)
    RESTS = (str(_S.PAUSED),)

    # -- what clients ask for

    def create(
        self, record: FineTuneRecord, limit: int, once: Once | None = None
    ) -> FineTuneRecord:
        """The record, or what `once` has made before. Raises Conflict where its owner has `limit`
        that have not ended, where its name is another's, and where `once` was something else."""
        with self._database.writing(alone=Lock.FINE_TUNES) as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return self._one(connection, first)
            if self._open_ones(connection, record.owner) >= limit:
                raise Conflict(
                    f"You have {limit} fine-tunes that have not ended, the most at a time "
                    "(fine_tunes.max_open). Wait for one, or cancel one.",
                    code="too_many_fine_tunes",
                    status=429,
                )
            if _is_taken(connection, record.name):
                raise Conflict(
                    f"There is a model named '{record.name}' already, or there will be.",
                    code="name_taken",
                )
            connection.execute(self.TABLE.insert().values(_values(record)))
            journal.note(connection, record.id, str(record.state))
            _tell(connection, record.id, f"Created fine-tuning job: {record.id}")
            return self._one(connection, record.id)

    def ask_cancel(self, fine_tune: str) -> FineTuneRecord:
        """It ends at once; what its job still does counts for nothing. Again does nothing. Raises
        NotFound; Conflict once it ended otherwise."""
        with self._database.writing() as connection:
            record = self._one(connection, fine_tune, lock=True)
            if record.state is _S.CANCELLED:
                return record
            if record.state.is_final:
                raise Conflict(
                    f"Cannot cancel a fine-tune with status '{record.state}'.",
                    code="fine_tune_ended",
                )
            _tell(connection, record.id, "The job was cancelled")
            return self._end(connection, record, _S.CANCELLED)

    def pause(self, fine_tune: str) -> FineTuneRecord:
        """It rests until `resume`; its job keeps a checkpoint first and leaves. Again does nothing.
        Raises NotFound; Conflict once it ended."""
        with self._database.writing() as connection:
            record = self._one(connection, fine_tune, lock=True)
            if record.state is _S.PAUSED:
                return record
            if record.state not in _PAUSABLE:
                raise Conflict(
                    f"Cannot pause a fine-tune with status '{record.state}'.",
                    code="fine_tune_ended",
                )
            _tell(connection, record.id, "The job was paused")
            return self._move(connection, record, _S.PAUSED, reason=None)

    def resume(self, fine_tune: str) -> FineTuneRecord:
        """It waits its turn again. Raises NotFound; Conflict where it does not rest."""
        with self._database.writing() as connection:
            record = self._one(connection, fine_tune, lock=True)
            if record.state is not _S.PAUSED:
                raise Conflict(
                    f"Cannot resume a fine-tune with status '{record.state}'.",
                    code="fine_tune_not_paused",
                )
            _tell(connection, record.id, "The job was resumed and moved to queued state")
            to = _S.VALIDATING if record.plan is None else _S.QUEUED
            return self._move(connection, record, to, idle_starts=0)

    def labelled(self, metadata: Mapping[str, str] | None) -> list[sa.ColumnElement[bool]]:
        """For `page`: those whose metadata have all these pairs; None: those without metadata."""
        column = self.TABLE.c.metadata
        if metadata is None:  # JSON's null, which is text
            return [sa.or_(column.is_(sa.null()), sa.cast(column, sa.Text) == "null")]
        return [self._database.labelled(column, key, value) for key, value in metadata.items()]

    def events(
        self, fine_tune: str, before: int | None, limit: int
    ) -> tuple[list[FineTuneEvent], bool]:
        """Newest first, those with smaller ids than `before`, and whether there are more."""
        table = tables.fine_tune_events.c
        wanted = (
            sa.select(tables.fine_tune_events)
            .where(table.fine_tune == fine_tune)
            .order_by(table.id.desc())
            .limit(limit + 1)
        )
        if before is not None:
            wanted = wanted.where(table.id < before)
        with self._database.reading() as connection:
            found = [FineTuneEvent(**row._mapping) for row in connection.execute(wanted)]
        return found[:limit], len(found) > limit

    # -- what its job does

    def move(
        self,
        record: FineTuneRecord,
        from_: Sequence[FineTuneState],
        to: FineTuneState,
        message: str,
        **values: Any,
    ) -> FineTuneRecord | None:
        """As its worker: the next state, which `message` tells as an event. None where it was in
        none of `from_`: it was paused. Raises LeaseLost. `values`: other columns."""
        with self._database.writing() as connection:
            found = self._held(connection, record)
            if found.state not in from_:
                return None
            _tell(connection, record.id, message)
            return self._move(connection, found, to, **values)

    def tell(
        self,
        record: FineTuneRecord,
        message: str,
        *,
        level: str = "info",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """As its worker: an event; with `data`, metrics of a step. Again does nothing: who goes on
        from a checkpoint comes to the same steps once more. Raises LeaseLost."""
        with self._database.writing() as connection:
            self._held(connection, record)
            if not _is_told(connection, record.id, message, data):
                _tell(connection, record.id, message, level, data)

    def keep(
        self, record: FineTuneRecord, step: int, checkpoint: AdapterRecord | None = None
    ) -> FineTuneRecord:
        """As its worker: training up to `step` is durable in the storage; `checkpoint`: that state
        can be served. Again does nothing. Raises LeaseLost."""
        with self._database.writing() as connection:
            found = self._held(connection, record)
            if checkpoint is not None and adapters.add(connection, checkpoint):
                _tell(connection, record.id, f"Checkpoint created at step {step}")
            changes = {"step": max(step, found.step)}
            if step > found.step:
                changes["idle_starts"] = 0
            return self._update(connection, found, changes)

    def finish(
        self,
        record: FineTuneRecord,
        adapter: AdapterRecord,
        results: FileRecord,
        trained_tokens: int,
    ) -> FineTuneRecord:
        """As its worker: it has succeeded. The model, the result file and the state become visible
        together. Raises LeaseLost."""
        with self._database.writing() as connection:
            found = self._held(connection, record)
            if not adapters.add(connection, adapter):
                message = f"There is a model named '{adapter.name}' already."
                error = {"code": "name_taken", "message": message, "param": None}
                return self._failed(connection, found, error)
            files.insert(connection, results)
            _tell(connection, record.id, f"New fine-tuned model created: {record.name}")
            _tell(connection, record.id, "The job has successfully completed")
            return self._end(
                connection,
                found,
                _S.SUCCEEDED,
                adapter=adapter.id,
                result_file_id=results.id,
                trained_tokens=trained_tokens,
                step=found.total_steps or found.step,
            )

    def fail(self, record: FineTuneRecord, error: Mapping[str, Any]) -> FineTuneRecord:
        """As its worker: the end. `error`: OpenAI's code, message, param. Raises LeaseLost."""
        with self._database.writing() as connection:
            found = self._held(connection, record)
            return self._failed(connection, found, error)

    # -- what the keeper of all of them does

    def end(self, record: FineTuneRecord, error: Mapping[str, Any]) -> FineTuneRecord | None:
        """Without a worker: no job can bring it to its end. None where it has one."""
        with self._database.writing() as connection:
            found = self._without_worker(connection, record)
            return None if found is None else self._failed(connection, found, error)

    # -- inside

    def _failed(
        self, connection: sa.Connection, found: FineTuneRecord, error: Mapping[str, Any]
    ) -> FineTuneRecord:
        _tell(connection, found.id, f"The job failed: {error['message']}", "error")
        return self._end(connection, found, _S.FAILED, error=dict(error))

    def _end(
        self, connection: sa.Connection, found: FineTuneRecord, to: FineTuneState, **values: Any
    ) -> FineTuneRecord:
        values = {"worker": None, "lease_until": 0.0, "reason": None} | values
        return self._move(connection, found, to, **values)

    def _read(self, row: sa.Row) -> FineTuneRecord:
        values = dict(row._mapping)
        values["state"] = FineTuneState(values["state"])
        return FineTuneRecord(**values)

    def _missing(self, record: str) -> NotFound:
        return no_fine_tune(record)


def no_fine_tune(fine_tune: str) -> NotFound:
    return NotFound(
        f"Could not find fine tune: {fine_tune[:100]}",
        param="fine_tuning_job_id",
        code="fine_tune_not_found",
    )


def _tell(
    connection: sa.Connection,
    fine_tune: str,
    message: str,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
) -> None:
    table = tables.fine_tune_events
    connection.execute(
        table.insert().values(
            fine_tune=fine_tune,
            at=time.time(),
            level=level,
            type="message" if data is None else "metrics",
            message=message,
            data=None if data is None else dict(data),
        )
    )
    oldest_kept = (
        sa.select(table.c.id)
        .where(table.c.fine_tune == fine_tune)
        .order_by(table.c.id.desc())
        .offset(MOST_EVENTS)
        .limit(1)
        .scalar_subquery()
    )
    connection.execute(
        table.delete().where(table.c.fine_tune == fine_tune, table.c.id <= oldest_kept)
    )


def _is_told(
    connection: sa.Connection, fine_tune: str, message: str, data: Mapping[str, Any] | None
) -> bool:
    """By the newest event of that type."""
    table = tables.fine_tune_events.c
    type = "message" if data is None else "metrics"
    newest = connection.execute(
        sa.select(table.message, table.data)
        .where(table.fine_tune == fine_tune, table.type == type)
        .order_by(table.id.desc())
        .limit(1)
    ).one_or_none()
    if newest is None:
        return False
    return newest.message == message if data is None else newest.data["step"] >= data["step"]


def _is_taken(connection: sa.Connection, name: str) -> bool:
    """By a fine-tune that has ended well or may yet do so, or by an adapter."""
    tunes, weights = tables.fine_tunes.c, tables.adapters.c
    lost = (str(_S.FAILED), str(_S.CANCELLED))
    promised = sa.select(tunes.id).where(tunes.name == name, tunes.state.not_in(lost))
    made = sa.select(weights.id).where(weights.name == name)
    return connection.execute(promised.union_all(made).limit(1)).first() is not None


def _values(record: FineTuneRecord) -> dict[str, Any]:
    values = asdict(record)
    return values | {
        "state": str(record.state),
        "times": {str(record.state): record.created_at, **record.times},
    }
