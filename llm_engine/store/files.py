"""Files as records; their bytes lie in the storage. An expired file is as good as gone."""

import time
from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa

from llm_engine.errors import Conflict, NotFound
from llm_engine.records import FileRecord
from llm_engine.store import idempotency, tables
from llm_engine.store.database import Database
from llm_engine.store.idempotency import Once

table = tables.files.c
ROUTE = "files"  # of the idempotency keys that make them


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, record: FileRecord, limit: int | None = None, once: Once | None = None
    ) -> FileRecord:
        """Only once its bytes are in the storage. The record, or what `once` has made before.

        Raises Conflict where its owner has `limit` of them, and where `once` was something else.
        Uploads that end at the same moment may pass the limit together.
        """
        with self._database.writing() as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return _one(connection, first)
            if limit is not None:
                check_room(connection, record.owner, limit)
            insert(connection, record)
        return record

    def get(self, file: str) -> FileRecord:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, file)

    def page(
        self,
        owner: str | None,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[FileRecord], bool]:
        """In the order of their ids, and whether there are more. `owner` None: of all.

        `after` is a place in that order; a file that is there no more marks it as well.
        """
        wanted = sa.select(tables.files).where(_alive()).limit(limit + 1)
        wanted = wanted.order_by(table.id.desc() if newest_first else table.id)
        if owner is not None:
            wanted = wanted.where(table.owner == owner)
        if purpose is not None:
            wanted = wanted.where(table.purpose == purpose)
        if after is not None:
            wanted = wanted.where(table.id < after if newest_first else table.id > after)
        with self._database.reading() as connection:
            found = [FileRecord(**row._mapping) for row in connection.execute(wanted)]
        return found[:limit], len(found) > limit

    def expire(self, file: str) -> FileRecord:
        """Gone for everybody from now on; what is left of it is for `remove`. Raises NotFound."""
        with self._database.writing() as connection:
            row = connection.execute(
                tables.files.update()
                .where(table.id == file, _alive())
                .values(expires_at=time.time())
                .returning(*table)
            ).one_or_none()
            if row is None:
                raise no_file(file)
            idempotency.release(connection, row.owner, ROUTE, file)
        return FileRecord(**row._mapping)

    def expired(self, now: float, limit: int) -> list[FileRecord]:
        """Those that went longest ago."""
        wanted = sa.select(tables.files).where(table.expires_at <= now)
        with self._database.reading() as connection:
            rows = connection.execute(wanted.order_by(table.expires_at).limit(limit))
            return [FileRecord(**row._mapping) for row in rows]

    def known(self, files: Sequence[str]) -> set[str]:
        """Of these ids, those of files that are there or were and are not forgotten yet."""
        wanted = sa.select(table.id).where(table.id.in_(files))
        with self._database.reading() as connection:
            return set(connection.execute(wanted).scalars())

    def remove(self, file: str) -> FileRecord:
        """Forget it, whether it has expired or not. Raises NotFound."""
        with self._database.writing() as connection:
            row = connection.execute(
                tables.files.delete().where(table.id == file).returning(*table)
            ).one_or_none()
            if row is None:
                raise no_file(file)
            idempotency.release(connection, row.owner, ROUTE, file)
        return FileRecord(**row._mapping)


def insert(connection: sa.Connection, record: FileRecord) -> None:
    connection.execute(tables.files.insert().values(asdict(record)))


def check_room(connection: sa.Connection, owner: str, limit: int) -> None:
    """Raises Conflict where they have `limit` files, those that are being uploaded included."""
    uploads = tables.uploads.c
    counted = (
        sa.select(sa.func.count()).where(table.owner == owner, _alive()),
        sa.select(sa.func.count()).where(uploads.owner == owner, uploads.status == "pending"),
    )
    if sum(connection.execute(each).scalar() or 0 for each in counted) >= limit:
        raise Conflict(
            f"You have {limit} files, the most that are kept (files.max_files). Delete some.",
            code="too_many_files",
            status=400,
        )


def no_file(file: str) -> NotFound:
    return NotFound(f"No such File object: {file[:100]}", param="id")


def _alive() -> sa.ColumnElement[bool]:
    return sa.or_(table.expires_at.is_(None), table.expires_at > time.time())


def _one(connection: sa.Connection, file: str) -> FileRecord:
    if "\0" in file:  # PostgreSQL knows no such text
        raise no_file(file)
    wanted = sa.select(tables.files).where(table.id == file, _alive())
    row = connection.execute(wanted).one_or_none()
    if row is None:
        raise no_file(file)
    return FileRecord(**row._mapping)
