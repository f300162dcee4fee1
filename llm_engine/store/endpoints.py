"""Endpoints as records: each step from one state to the next is a compare-and-set with an event.

    create ──▶ UPDATE_PENDING ──▶ UPDATE_IN_PROGRESS ──▶ READY ◀──▶ UPDATE_FAILED
                     ▲                                     │ update │
                     └─────────────────────────────────────┴────────┘
    any of them ── delete ──▶ DELETE_IN_PROGRESS ──▶ gone

Clients ask (`create`, `ask_change`, `ask_delete`, `declare`); the controller alone tells what has
become of it (`observe`, `note_deployed`, `remove`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from llm_engine.config import EndpointSettings
from llm_engine.endpoints import OPERATOR, declaration, generation
from llm_engine.errors import Conflict, NotFound
from llm_engine.ids import new_id
from llm_engine.records import EndpointRecord
from llm_engine.statuses import EndpointState
from llm_engine.store import journal, tables
from llm_engine.store.database import Database, Lock

table = tables.endpoints.c
#: Earlier starts that an ETA is learned from.
LEARNED_FROM = 5
Change = Callable[[EndpointRecord], tuple[EndpointSettings, dict[str, Any]]]


class Endpoints:
    def __init__(self, database: Database) -> None:
        self._database = database

    # -- what clients ask for

    def create(
        self,
        settings: EndpointSettings,
        owner: str,
        extras: dict[str, Any],
        limit: int,
        origin: str = "api",
    ) -> EndpointRecord:
        """Raises Conflict where the name is taken or there are `limit` endpoints.

        `origin` "batch": for the life of the batch that it is named after.
        """
        try:
            with self._database.writing(alone=Lock.ENDPOINTS) as connection:
                counted = sa.select(sa.func.count()).select_from(tables.endpoints)
                if (connection.execute(counted).scalar() or 0) >= limit:
                    raise Conflict(
                        f"There are {limit} endpoints, the most that are kept "
                        "(store.max_endpoints).",
                        code="too_many_endpoints",
                    )
                return _insert(connection, settings, owner, origin, extras)
        except IntegrityError:
            raise Conflict(
                f"An endpoint named '{settings.name}' exists already. Choose another name, or "
                "update that one.",
                param="name",
                code="name_taken",
            ) from None

    def ask_change(self, name: str, change: Change) -> EndpointRecord:
        """Replace its settings and extras by what `change` makes of the record.

        Raises NotFound, or Conflict while another operation is under way.
        """
        with self._database.writing() as connection:
            record = _locked(connection, name)
            if record.state is EndpointState.DELETE_IN_PROGRESS or not record.settled:
                raise busy(record)
            settings, extras = change(record)
            return _respecify(connection, record, settings, extras=extras)

    def ask_delete(self, name: str) -> EndpointRecord:
        """Also ends an operation that is under way. Raises NotFound; Conflict the second time."""
        with self._database.writing() as connection:
            record = _locked(connection, name)
            if record.state is EndpointState.DELETE_IN_PROGRESS:
                raise busy(record)
            if record.origin == "config":
                raise Conflict(
                    f"The endpoint '{name}' is declared in the configuration: remove it there, "
                    "or it would come back.",
                    code="declared_in_configuration",
                )
            return _deleting(connection, record)

    def declare(self, declared: Sequence[EndpointSettings]) -> list[str]:
        """The configuration's endpoints: made, changed where their own entry changed, deleted.

        What clients made is left alone. Returns the names that a client's endpoint has taken.
        """
        taken = []
        with self._database.writing(alone=Lock.ENDPOINTS) as connection:
            known = {record.name: record for record in _all(connection, lock=True)}
            for settings in declared:
                record = known.get(settings.name)
                version = declaration(settings)
                if record is None:
                    _insert(connection, settings, OPERATOR, "config", {}, declared=version)
                elif record.origin != "config":
                    taken.append(settings.name)
                elif record.declared != version and not _leaving(record):
                    _respecify(connection, record, settings, declared=version)
            names = {settings.name for settings in declared}
            for record in known.values():
                if record.origin == "config" and record.name not in names and not _leaving(record):
                    _deleting(connection, record)
        return taken

    # -- what is there

    def all(self) -> list[EndpointRecord]:
        with self._database.reading() as connection:
            return _all(connection)

    def get(self, name: str) -> EndpointRecord:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _find(connection, name)

    # -- what the controller tells

    def observe(
        self,
        record: EndpointRecord,
        state: EndpointState,
        reason: str | None,
        settled: bool,
        phases: dict[str, float | None] | None,
    ) -> EndpointRecord | None:
        """The record with its new state; None where somebody has changed it in between."""
        reason = reason and reason.replace("\x00", "")  # an engine's last words may be anything
        with self._database.writing() as connection:
            row = connection.execute(
                tables.endpoints.update()
                .where(table.id == record.id, table.revision == record.revision)
                .values(
                    state=str(state),
                    reason=reason,
                    settled=settled,
                    phases=phases,
                    updated_at=time.time(),
                    revision=record.revision + 1,
                )
                .returning(*table)
            ).one_or_none()
            if row is None:
                return None
            if state is not record.state or reason != record.reason:
                journal.note(connection, record.id, str(state), reason)
            return _record(row)

    def note_deployed(self, endpoint: str, version: str) -> EndpointRecord | None:
        """`version`: the generation that the cluster now has. None where it is gone."""
        with self._database.writing() as connection:
            row = connection.execute(
                tables.endpoints.update()
                .where(table.id == endpoint)
                .values(deployed=version, revision=table.revision + 1)
                .returning(*table)
            ).one_or_none()
            return None if row is None else _record(row)

    def remove(self, record: EndpointRecord) -> None:
        """Nothing of it is left in the cluster."""
        with self._database.writing() as connection:
            done = connection.execute(tables.endpoints.delete().where(table.id == record.id))
            if done.rowcount:
                journal.note(connection, record.id, "deleted")

    # -- how long starts take

    def add_start(self, signature: str, seconds: float) -> None:
        with self._database.writing() as connection:
            connection.execute(
                tables.starts.insert().values(signature=signature, at=time.time(), seconds=seconds)
            )
            kept = (
                sa.select(tables.starts.c.id)
                .where(tables.starts.c.signature == signature)
                .order_by(tables.starts.c.id.desc())
                .limit(LEARNED_FROM)
            )
            connection.execute(
                tables.starts.delete().where(
                    tables.starts.c.signature == signature, tables.starts.c.id.not_in(kept)
                )
            )

    def starts(self) -> dict[str, list[float]]:
        """Seconds of the last few starts, by signature."""
        with self._database.reading() as connection:
            found: dict[str, list[float]] = {}
            for row in connection.execute(sa.select(tables.starts).order_by(tables.starts.c.id)):
                found.setdefault(row.signature, []).append(row.seconds)
            return found


def busy(record: EndpointRecord) -> Conflict:
    doing = {
        EndpointState.DELETE_IN_PROGRESS: "is being deleted",
        EndpointState.UPDATE_PENDING: "has an operation waiting",
    }.get(record.state, "is still starting or updating")
    return Conflict(
        f"The endpoint '{record.name}' {doing}. Wait until that has ended, then try again.",
        code="operation_in_progress",
    )


def _insert(
    connection: sa.Connection,
    settings: EndpointSettings,
    owner: str,
    origin: str,
    extras: dict[str, Any],
    declared: str | None = None,
) -> EndpointRecord:
    now = time.time()
    state = EndpointState.UPDATE_PENDING
    row = connection.execute(
        tables.endpoints.insert()
        .values(
            id=new_id("ep"),
            name=settings.name,
            owner=owner,
            origin=origin,
            spec=settings.model_dump(mode="json"),
            extras=extras,
            state=str(state),
            settled=False,
            revision=0,
            declared=declared,
            created_at=now,
            requested_at=now,
            updated_at=now,
        )
        .returning(*table)
    ).one()
    journal.note(connection, row.id, "created")
    journal.note(connection, row.id, str(state))
    return _record(row)


def _respecify(
    connection: sa.Connection, record: EndpointRecord, settings: EndpointSettings, **values: Any
) -> EndpointRecord:
    """Other settings. Only those that an engine is made of make it start anew."""
    before = EndpointSettings.model_validate(record.spec)
    now = time.time()
    values |= {
        "spec": settings.model_dump(mode="json"),
        "revision": record.revision + 1,
        "updated_at": now,
    }
    journal.note(connection, record.id, "update.requested")
    if generation(before) != generation(settings) or record.state is EndpointState.UPDATE_FAILED:
        state = EndpointState.UPDATE_PENDING
        values |= {"state": str(state), "reason": None, "settled": False, "requested_at": now}
        journal.note(connection, record.id, str(state))
    return _update(connection, record, values)


def _deleting(connection: sa.Connection, record: EndpointRecord) -> EndpointRecord:
    state = EndpointState.DELETE_IN_PROGRESS
    now = time.time()
    journal.note(connection, record.id, str(state))
    changes = {"state": str(state), "reason": None, "settled": False, "requested_at": now}
    return _update(
        connection, record, changes | {"revision": record.revision + 1, "updated_at": now}
    )


def _update(
    connection: sa.Connection, record: EndpointRecord, values: dict[str, Any]
) -> EndpointRecord:
    statement = tables.endpoints.update().where(table.id == record.id).values(values)
    return _record(connection.execute(statement.returning(*table)).one())


def _all(connection: sa.Connection, lock: bool = False) -> list[EndpointRecord]:
    wanted = sa.select(tables.endpoints).order_by(table.id)
    rows = connection.execute(wanted.with_for_update() if lock else wanted)
    return [_record(row) for row in rows]


def _find(connection: sa.Connection, name: str, lock: bool = False) -> EndpointRecord:
    if "\0" in name:  # PostgreSQL knows no such text
        raise not_found(name)
    wanted = sa.select(tables.endpoints).where(table.name == name)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise not_found(name)
    return _record(row)


def _locked(connection: sa.Connection, name: str) -> EndpointRecord:
    return _find(connection, name, lock=True)


def not_found(name: str) -> NotFound:
    return NotFound(f"There is no endpoint '{name}'.", code="endpoint_not_found")


def _leaving(record: EndpointRecord) -> bool:
    return record.state is EndpointState.DELETE_IN_PROGRESS


def _record(row: sa.Row) -> EndpointRecord:
    values = dict(row._mapping)
    values["state"] = EndpointState(values["state"])
    return EndpointRecord(**values)
