"""Uploads as records: files that come in parts.

pending ──▶ completed    its parts have become a file, in the same transaction
   ├──────▶ cancelled
   └──────▶ expired      by the clock, whether it has been written down already or not
"""

import time
from dataclasses import asdict, replace

import sqlalchemy as sa

from llm_engine.errors import InvalidRequest, NotFound
from llm_engine.records import FileRecord, UploadPart, UploadRecord
from llm_engine.store import files, idempotency, tables
from llm_engine.store.database import Database
from llm_engine.store.idempotency import Once

table = tables.uploads.c
_parts = tables.upload_parts.c
#: A completion that began in time may end so much later. Seconds.
GRACE_S = 600.0


class Uploads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, record: UploadRecord, limit: int, once: Once | None = None) -> UploadRecord:
        """The record, or what `once` has made before. Raises Conflict where its owner has `limit`
        files, or where `once` was something else."""
        with self._database.writing() as connection:
            if once is not None:
                first = idempotency.claim(connection, once, record.id)
                if first != record.id:
                    return _one(connection, first)
            files.check_room(connection, record.owner, limit)
            connection.execute(tables.uploads.insert().values(asdict(record)))
        return record

    def get(self, upload: str) -> UploadRecord:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _one(connection, upload)

    def add_part(
        self, part: UploadPart, most: int, most_bytes: int, once: Once | None = None
    ) -> UploadPart:
        """Only once its bytes are in the storage. The part, or what `once` has made before.

        Raises InvalidRequest where the upload takes no more: it has ended, or has `most` parts or
        `most_bytes` in them; Conflict where `once` was something else.
        """
        with self._database.writing() as connection:
            check_open(_one(connection, part.upload, lock=True))
            if once is not None:
                first = idempotency.claim(connection, once, part.id)
                if first != part.id:
                    before = sa.select(tables.upload_parts).where(_parts.id == first)
                    return UploadPart(**connection.execute(before).one()._mapping)
            count, size = connection.execute(
                sa.select(sa.func.count(), sa.func.sum(_parts.bytes)).where(
                    _parts.upload == part.upload
                )
            ).one()
            if count >= most:
                raise InvalidRequest(
                    f"This upload has {most} parts, the most that one takes (files.max_parts).",
                    code="too_many_parts",
                )
            if int(size or 0) + part.bytes > most_bytes:
                raise InvalidRequest(
                    "This upload's parts are far larger than it was declared to be.",
                    param="data",
                    code="upload_too_large",
                )
            connection.execute(tables.upload_parts.insert().values(asdict(part)))
        return part

    def parts(self, upload: str) -> dict[str, UploadPart]:
        """By id."""
        wanted = sa.select(tables.upload_parts).where(_parts.upload == upload)
        with self._database.reading() as connection:
            return {row.id: UploadPart(**row._mapping) for row in connection.execute(wanted)}

    def complete(self, upload: str, file: FileRecord, once: Once) -> UploadRecord:
        """It and its file become visible together, and its parts are forgotten. As it is now:
        whoever comes second finds another file, or that it was cancelled. Raises NotFound."""
        with self._database.writing() as connection:
            record = _one(connection, upload, lock=True, by_the_clock=False)
            if record.status != "pending":
                return record
            files.insert(connection, file)
            idempotency.claim(connection, once, file.id)
            return _end(connection, record, "completed", file.id)

    def cancel(self, upload: str) -> UploadRecord:
        """Again does nothing. Raises NotFound, and InvalidRequest where it has ended otherwise."""
        with self._database.writing() as connection:
            record = _one(connection, upload, lock=True)
            if record.status == "cancelled":
                return record
            check_open(record)
            return _end(connection, record, "cancelled")

    # -- housekeeping

    def overdue(self, now: float, limit: int) -> list[UploadRecord]:
        """Pending ones whose time is over."""
        return self._until(now - GRACE_S, limit, table.status == "pending")

    def expire(self, upload: str) -> None:
        """Does nothing where it has ended by now."""
        with self._database.writing() as connection:
            record = _one(connection, upload, lock=True, by_the_clock=False)
            if record.status == "pending":
                _end(connection, record, "expired")

    def old(self, now: float, limit: int) -> list[UploadRecord]:
        """Those that nobody will ask for any more."""
        return self._until(now - idempotency.KEPT_S, limit, table.status != "pending")

    def remove(self, upload: str) -> None:
        with self._database.writing() as connection:
            connection.execute(tables.upload_parts.delete().where(_parts.upload == upload))
            connection.execute(tables.uploads.delete().where(table.id == upload))

    def _until(self, end: float, limit: int, which: sa.ColumnElement) -> list[UploadRecord]:
        wanted = sa.select(tables.uploads).where(table.expires_at <= end, which)
        with self._database.reading() as connection:
            rows = connection.execute(wanted.order_by(table.expires_at).limit(limit))
            return [UploadRecord(**row._mapping) for row in rows]


def check_open(record: UploadRecord) -> None:
    """Raises InvalidRequest where it has ended."""
    if record.status != "pending":
        raise InvalidRequest(
            f"Upload '{record.id}' is {record.status}; only a pending one can be changed.",
            param="upload_id",
            code=f"upload_{record.status}",
        )


def no_upload(upload: str) -> NotFound:
    return NotFound(f"No such Upload object: {upload[:100]}", param="upload_id")


def _end(
    connection: sa.Connection, record: UploadRecord, status: str, file: str | None = None
) -> UploadRecord:
    connection.execute(tables.upload_parts.delete().where(_parts.upload == record.id))
    changed = tables.uploads.update().where(table.id == record.id)
    row = connection.execute(changed.values(status=status, file_id=file).returning(*table)).one()
    return UploadRecord(**row._mapping)


def _one(
    connection: sa.Connection, upload: str, lock: bool = False, by_the_clock: bool = True
) -> UploadRecord:
    if "\0" in upload:  # PostgreSQL knows no such text
        raise no_upload(upload)
    wanted = sa.select(tables.uploads).where(table.id == upload)
    row = connection.execute(wanted.with_for_update() if lock else wanted).one_or_none()
    if row is None:
        raise no_upload(upload)
    record = UploadRecord(**row._mapping)
    late = record.status == "pending" and record.expires_at <= time.time()
    return replace(record, status="expired") if late and by_the_clock else record
