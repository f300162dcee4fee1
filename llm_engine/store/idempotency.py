"""What a request with an Idempotency-Key has made, so that asking again makes nothing twice."""

import time
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from llm_engine.errors import Conflict
from llm_engine.store import tables
from llm_engine.store.database import Database

table = tables.idempotency.c
KEPT_S = 86400.0
LONGEST_KEY = 255  # characters


class Once(NamedTuple):
    """A request that came with a key. `find(*once)`, `remember(*once, subject)`."""

    owner: str
    route: str
    key: str
    digest: bytes  # SHA-256 of what is asked for


class Idempotency:
    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, owner: str, route: str, key: str, digest: bytes) -> str | None:
        """The id of what the same request has made. Raises Conflict where it was another one."""
        with self._database.reading() as connection:
            return _find(connection, Once(owner, route, key, digest))

    def remember(self, owner: str, route: str, key: str, digest: bytes, subject: str) -> str:
        """What the key stands for: `subject`, or what another request with it made before.

        Raises Conflict where that one asked for something else.
        """
        with self._database.writing() as connection:
            return claim(connection, Once(owner, route, key, digest), subject)

    def forget(self, owner: str, route: str, key: str) -> None:
        """What it made is gone."""
        with self._database.writing() as connection:
            connection.execute(
                tables.idempotency.delete().where(
                    table.owner == owner, table.route == route, table.key == key
                )
            )

    def forget_old(self, now: float) -> int:
        with self._database.writing() as connection:
            old = tables.idempotency.delete().where(table.at <= now - KEPT_S)
            return connection.execute(old).rowcount


def claim(connection: sa.Connection, once: Once, subject: str) -> str:
    """`remember` inside of a transaction: what the key stands for is there, or neither is."""
    mine = (table.owner == once.owner, table.route == once.route, table.key == once.key)
    now = time.time()
    connection.execute(tables.idempotency.delete().where(*mine, table.at <= now - KEPT_S))
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = once._asdict() | {"subject": subject, "at": now}
    # Waits for another transaction with the same key, and then sees what that one has made.
    connection.execute(dialect.insert(tables.idempotency).values(values).on_conflict_do_nothing())
    return _find(connection, once) or subject


def release(connection: sa.Connection, owner: str, route: str, subject: str) -> None:
    """The record is gone: its key may make another one."""
    connection.execute(
        tables.idempotency.delete().where(
            table.owner == owner, table.route == route, table.subject == subject
        )
    )


def _find(connection: sa.Connection, once: Once) -> str | None:
    row = connection.execute(
        sa.select(table.digest, table.subject).where(
            table.owner == once.owner,
            table.route == once.route,
            table.key == once.key,
            table.at > time.time() - KEPT_S,
        )
    ).one_or_none()
    if row is None:
        return None
    if bytes(row.digest) != once.digest:
        raise Conflict(
            "This Idempotency-Key was used for another request in the last 24 hours. "
            "Take a new key for a new request.",
            code="idempotency_key_reused",
        )
    return row.subject
