"""LoRA weights as records. Names are unique among all owners."""

import time

import sqlalchemy as sa

from llm_engine.config import MERGED
from llm_engine.errors import Conflict, NotFound
from llm_engine.records import AdapterRecord
from llm_engine.statuses import FineTuneState
from llm_engine.store import journal, tables
from llm_engine.store.database import Database

table = tables.adapters.c


class Adapters:
    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[AdapterRecord]:
        """Those that can be served."""
        return self._read(table.deleted_at.is_(None))

    def of(self, fine_tune: str) -> list[AdapterRecord]:
        """Its checkpoints and its result, by step."""
        return self._read(table.fine_tune == fine_tune, table.deleted_at.is_(None))

    def deleted(self) -> list[AdapterRecord]:
        """Those whose bytes are still in the storage."""
        return self._read(table.deleted_at.is_not(None))

    def get(self, name: str) -> AdapterRecord:
        """Raises NotFound."""
        found = (
            self._read(table.name == name, table.deleted_at.is_(None)) if "\0" not in name else []
        )
        if not found:
            raise NotFound(
                f"The model '{name[:200]}' does not exist or you do not have access to it.",
                param="model",
                code="model_not_found",
            )
        return found[0]

    def find(self, adapter: str) -> AdapterRecord | None:
        """By its id; None where there is none, or no longer."""
        if "\0" in adapter:
            return None
        return next(iter(self._read(table.id == adapter, table.deleted_at.is_(None))), None)

    def delete(self, adapter: str) -> bool:
        """Nobody can name it any more. False where somebody else was first. Raises Conflict where
        an endpoint is made of it, or a fine-tune that has not ended goes on from it."""
        with self._database.writing() as connection:
            gone = connection.execute(
                tables.adapters.update()
                .where(table.id == adapter, table.deleted_at.is_(None))
                .values(deleted_at=time.time())
            )
            if gone.rowcount:
                _check_unused(connection, adapter)
                journal.note(connection, adapter, "adapter.deleted")
            return bool(gone.rowcount)

    def forget(self, adapter: str) -> None:
        """Its bytes are gone."""
        with self._database.writing() as connection:
            connection.execute(
                tables.adapters.delete().where(table.id == adapter, table.deleted_at.is_not(None))
            )

    def _read(self, *wanted: sa.ColumnElement[bool]) -> list[AdapterRecord]:
        rows = sa.select(tables.adapters).where(*wanted).order_by(table.step, table.id)
        with self._database.reading() as connection:
            return [AdapterRecord(**row._mapping) for row in connection.execute(rows)]


def _check_unused(connection: sa.Connection, adapter: str) -> None:
    """Within the transaction that deletes it, which this undoes. Raises Conflict."""
    user = None
    endpoints = sa.select(tables.endpoints.c.name, tables.endpoints.c.spec)
    for row in connection.execute(endpoints):
        if row.spec["model"] == f"{MERGED}{adapter}":
            user = f"The endpoint '{row.name}' is made of this model. Delete the endpoint first."
    tunes = tables.fine_tunes.c
    ended = [str(state) for state in FineTuneState if state.is_final]
    going_on = sa.select(tunes.id).where(tunes.parent == adapter, tunes.state.not_in(ended))
    tune = connection.execute(going_on.limit(1)).scalar()
    if tune is not None:
        user = f"The fine-tune '{tune}' goes on from this model. Wait for its end, or cancel it."
    if user is not None:
        raise Conflict(user, param="model", code="model_in_use")


def add(connection: sa.Connection, record: AdapterRecord) -> bool:
    """Within a transaction of its fine-tune's. False where it is there already, or was: a step
    that is trained again makes no second checkpoint of the name."""
    known = sa.select(table.id).where(sa.or_(table.id == record.id, table.name == record.name))
    if connection.execute(known).scalar() is not None:
        return False
    values = {name: getattr(record, name) for name in AdapterRecord.__dataclass_fields__}
    connection.execute(tables.adapters.insert().values(values))
    journal.note(connection, record.id, "adapter.created", record.name)
    return True
