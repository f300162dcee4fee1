"""Files and uploads as records; their bytes lie in the storage."""

import time
from dataclasses import asdict

import sqlalchemy as sa

from llm_engine.errors import NotFound
from llm_engine.records import FileRecord
from llm_engine.store import tables
from llm_engine.store.database import Database

table = tables.files.c


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: FileRecord) -> None:
        """Only once its bytes are in the storage."""
        with self._database.writing() as connection:
            insert(connection, record)

    def get(self, file: str) -> FileRecord:
        """Raises NotFound, for an expired one too."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(tables.files).where(table.id == file)).one_or_none()
        if row is None or (row.expires_at is not None and row.expires_at <= time.time()):
            raise no_file(file)
        return FileRecord(**row._mapping)

    def remove(self, file: str) -> FileRecord:
        """Raises NotFound. Whoever calls deletes its bytes after that."""
        with self._database.writing() as connection:
            row = connection.execute(
                tables.files.delete().where(table.id == file).returning(*table)
            ).one_or_none()
        if row is None:
            raise no_file(file)
        return FileRecord(**row._mapping)


def insert(connection: sa.Connection, record: FileRecord) -> None:
    connection.execute(tables.files.insert().values(asdict(record)))


def no_file(file: str) -> NotFound:
    return NotFound(f"No such File object: {file}", param="id")
