"""Keeping a file: first its bytes, then its record; gone in the other order."""

import time
from collections.abc import Iterable

from llm_engine.ids import new_id
from llm_engine.records import FileRecord
from llm_engine.storage.base import Storage
from llm_engine.store.sql import Store


def new_file_id() -> str:
    return new_id("file", "-")


def key_of(file: str) -> str:
    """Where its bytes lie in the storage."""
    return f"files/{file}"


def keep(
    storage: Storage,
    store: Store,
    *,
    owner: str,
    purpose: str,
    filename: str,
    pieces: Iterable[bytes],
    expires_after_s: float | None = None,
) -> FileRecord:
    """Blocking. Raises StorageUnavailable or StoreUnavailable, and then leaves nothing."""
    file = new_file_id()
    with storage.writer(key_of(file)) as writer:
        for piece in pieces:
            writer.write(piece)
    now = time.time()
    record = FileRecord(
        id=file,
        owner=owner,
        purpose=purpose,
        filename=filename,
        bytes=writer.bytes,
        created_at=now,
        key=key_of(file),
        expires_at=None if expires_after_s is None else now + expires_after_s,
    )
    try:
        store.files.add(record)
    except BaseException:
        storage.delete(record.key)
        raise
    return record


def discard(storage: Storage, store: Store, file: str) -> None:
    """Raises NotFound where there is none."""
    storage.delete(store.files.remove(file).key)
