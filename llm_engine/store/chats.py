"""Chat completions that were asked for with `store: true`."""

import time
from dataclasses import asdict

import sqlalchemy as sa

from llm_engine.errors import NotFound
from llm_engine.responses import StoredChat
from llm_engine.store import tables
from llm_engine.store.database import Database

table = tables.chats.c


class Chats:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: StoredChat) -> None:
        with self._database.writing() as connection:
            connection.execute(tables.chats.insert().values(asdict(record)))

    def get(self, chat: str) -> StoredChat:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, chat)

    def page(
        self,
        owner: str | None,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = False,
        model: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> tuple[list[StoredChat], bool]:
        """And whether there are more; without their requests, which may be large. Raises NotFound
        where they have no chat `after`."""
        at, place = table.created_at, sa.tuple_(table.created_at, table.id)
        order = (at.desc(), table.id.desc()) if newest_first else (at, table.id)
        shown = [column for column in table if column.name != "request"]
        wanted = sa.select(*shown).where(_alive()).order_by(*order).limit(limit + 1)
        if owner is not None:
            wanted = wanted.where(table.owner == owner)
        if model is not None:
            wanted = wanted.where(table.model == model)
        for name, value in (metadata or {}).items():
            wanted = wanted.where(self._database.labelled(table.metadata, name, value))
        with self._database.reading() as connection:
            if after is not None:
                cursor = _one(connection, after)
                if owner not in (None, cursor.owner):
                    raise no_chat(after)
                edge = sa.tuple_(sa.literal(cursor.created_at), sa.literal(cursor.id))
                wanted = wanted.where(place < edge if newest_first else place > edge)
            found = [StoredChat(**row._mapping) for row in connection.execute(wanted)]
        return found[:limit], len(found) > limit

    def change(self, chat: str, metadata: dict[str, str]) -> StoredChat:
        """Raises NotFound."""
        with self._database.writing() as connection:
            _one(connection, chat)
            mine = tables.chats.update().where(table.id == chat)
            connection.execute(mine.values(metadata=metadata))
            return _one(connection, chat)

    def delete(self, chat: str) -> None:
        """Raises NotFound."""
        with self._database.writing() as connection:
            _one(connection, chat)
            connection.execute(tables.chats.delete().where(table.id == chat))

    def sweep(self, now: float, limit: int = 500) -> int:
        """Forget some of those that have expired; how many."""
        old = sa.select(table.id).where(table.expires_at <= now).limit(limit)
        with self._database.writing() as connection:
            gone = connection.execute(tables.chats.delete().where(table.id.in_(old)))
            return gone.rowcount


def no_chat(chat: str) -> NotFound:
    return NotFound(f"Chat completion with id '{chat[:100]}' not found.", param="completion_id")


def _alive() -> sa.ColumnElement[bool]:
    return table.expires_at > time.time()


def _one(connection: sa.Connection, chat: str) -> StoredChat:
    if "\0" in chat:  # PostgreSQL knows no such text
        raise no_chat(chat)
    wanted = sa.select(tables.chats).where(table.id == chat, _alive())
    row = connection.execute(wanted).one_or_none()
    if row is None:
        raise no_chat(chat)
    return StoredChat(**row._mapping)
