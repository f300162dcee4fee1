"""Registered models: aliases and external upstreams. Names are unique to their owner."""

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from llm_engine.errors import Conflict, NotFound
from llm_engine.records import ModelRecord
from llm_engine.store import journal, tables
from llm_engine.store.database import Database, Lock


class Registered:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: ModelRecord, limit: int) -> None:
        """Raises Conflict for a name that the owner has already, or where there are `limit`."""
        values = {name: getattr(record, name) for name in ModelRecord.__dataclass_fields__}
        try:
            with self._database.writing(alone=Lock.MODELS) as connection:
                counted = sa.select(sa.func.count()).select_from(tables.models)
                if (connection.execute(counted).scalar() or 0) >= limit:
                    raise Conflict(
                        f"{limit} models are registered, the most that are kept "
                        "(store.max_models).",
                        code="too_many_models",
                    )
                connection.execute(tables.models.insert().values(values))
                journal.note(connection, record.id, "model.created")
        except IntegrityError:
            raise Conflict(
                f"You have a model named '{record.name}' already.", param="name", code="name_taken"
            ) from None

    def all(self) -> list[ModelRecord]:
        wanted = sa.select(tables.models).order_by(tables.models.c.id)
        with self._database.reading() as connection:
            return [ModelRecord(**row._mapping) for row in connection.execute(wanted)]

    def get(self, model: str) -> ModelRecord:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, model)

    def change(self, model: str, /, **values: Any) -> ModelRecord:
        """Raises NotFound, or Conflict where the new name is taken."""
        try:
            with self._database.writing() as connection:
                connection.execute(
                    tables.models.update()
                    .where(tables.models.c.id == model)
                    .values(
                        **values,
                        updated_at=time.time(),
                        revision=tables.models.c.revision + 1,
                    )
                )
                changed = _one(connection, model)
                journal.note(connection, model, "model.changed")
                return changed
        except IntegrityError:
            raise Conflict(
                f"You have a model named '{values.get('name')}' already.",
                param="name",
                code="name_taken",
            ) from None

    def remove(self, model: str) -> None:
        """Raises NotFound."""
        with self._database.writing() as connection:
            if not connection.execute(
                tables.models.delete().where(tables.models.c.id == model)
            ).rowcount:
                raise no_model(model)
            journal.note(connection, model, "model.deleted")


def _one(connection: sa.Connection, model: str) -> ModelRecord:
    row = connection.execute(
        sa.select(tables.models).where(tables.models.c.id == model)
    ).one_or_none()
    if row is None:
        raise no_model(model)
    return ModelRecord(**row._mapping)


def no_model(model: str) -> NotFound:
    return NotFound(f"There is no model '{model}'.", code="model_not_found")
