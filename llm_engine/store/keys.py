"""Keys: made, found by digest, revoked. A revoked key stays, so that it can be told apart."""

import time
from collections.abc import Collection

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.records import KeyRecord, Scope
from llm_engine.store import journal, tables
from llm_engine.store.database import Database, Lock


class Keys:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: KeyRecord, limit: int) -> None:
        """Raises Conflict where there are `limit` keys already, not counting revoked ones."""
        with self._database.writing(alone=Lock.KEYS) as connection:
            if _count(connection) >= limit:
                # Once forgotten they are refused all the same, just with fewer words.
                revoked = tables.keys.c.revoked_at.is_not(None)
                connection.execute(tables.keys.delete().where(revoked))
            if _count(connection) >= limit:
                raise Conflict(
                    f"There are {limit} keys, the most that are kept (store.max_keys). Revoke "
                    "some, or raise it.",
                    code="too_many_keys",
                )
            connection.execute(
                tables.keys.insert().values(
                    id=record.id,
                    owner=record.owner,
                    name=record.name,
                    digest=record.digest,
                    prefix=record.prefix,
                    scopes=[str(scope) for scope in record.scopes],
                    created_at=record.created_at,
                    expires_at=record.expires_at,
                )
            )
            journal.note(connection, record.id, "key.created")

    def all(self, owner: str | None = None) -> list[KeyRecord]:
        """Oldest first; of one owner, or all."""
        wanted = sa.select(tables.keys).order_by(tables.keys.c.id)
        if owner is not None:
            wanted = wanted.where(tables.keys.c.owner == owner)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(wanted)]

    def find(self, digests: Collection[bytes]) -> list[KeyRecord]:
        wanted = sa.select(tables.keys).where(tables.keys.c.digest.in_(digests))
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(wanted)]

    def revoke(self, key: str, owner: str | None = None) -> KeyRecord:
        """Once revoked it stays so; again does nothing. Raises NotFound."""
        if "\0" in key:  # PostgreSQL knows no such text
            raise _no_key(key)
        mine = tables.keys.c.id == key
        if owner is not None:
            mine &= tables.keys.c.owner == owner
        with self._database.writing() as connection:
            done = connection.execute(
                tables.keys.update()
                .where(mine, tables.keys.c.revoked_at.is_(None))
                .values(revoked_at=time.time())
            )
            row = connection.execute(sa.select(tables.keys).where(mine)).one_or_none()
            if row is None:
                raise _no_key(key)
            if done.rowcount:
                journal.note(connection, key, "key.revoked")
            return _record(row)


def _no_key(key: str) -> NotFound:
    return NotFound(f"There is no key '{key}'.", code="key_not_found")


def _count(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(tables.keys)).scalar_one()


def _record(row: sa.Row) -> KeyRecord:
    values = dict(row._mapping)
    values["scopes"] = tuple(Scope(scope) for scope in values["scopes"])
    return KeyRecord(**values)
