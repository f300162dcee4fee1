"""Keeping a file: first its bytes, then its record; gone in the other order. All of it blocks.

    files/<file id>               the bytes of a file
    uploads/<upload id>/<part id> the parts of an upload, until they are a file

A file that is deleted expires now; bytes that cannot be deleted yet are taken by the next `sweep`.

A store that falls silent may have taken a record all the same: then its bytes stay. Those that
turn out to have none go with `sweep_orphans`.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import orjson

from llm_engine.errors import InvalidRequest, NotFound, StorageUnavailable, StoreUnavailable
from llm_engine.ids import new_id
from llm_engine.records import FileRecord, UploadPart, UploadRecord
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.idempotency import Once
from llm_engine.store.sql import Store
from llm_engine.store.uploads import check_open

logger = logging.getLogger("llm_engine.files")

BATCH = "batch"  # a purpose
#: Input files of batches go by themselves, as OpenAI's do.
BATCH_EXPIRES_S = 30 * 86400
_BOM = b"\xef\xbb\xbf"
MOST_SWEPT = 200  # records of each kind in one sweep
ORPHAN_S = 6 * 3600.0


def new_file_id() -> str:
    return new_id("file", "-")


def key_of(file: str) -> str:
    """Where its bytes lie in the storage."""
    return f"files/{file}"


def part_key(upload: str, part: str) -> str:
    return f"uploads/{upload}/{part}"


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
    """Raises StorageUnavailable or StoreUnavailable; nobody sees what it leaves then."""
    file = new_file_id()
    with storage.writer(key_of(file)) as writer:
        for piece in pieces:
            writer.write(piece)
    record = new_record(file, owner, purpose, filename, writer.bytes, expires_after_s)
    try:
        store.files.add(record)
    except StoreUnavailable:
        raise
    except BaseException:
        storage.delete(record.key)
        raise
    return record


def new_record(
    file: str,
    owner: str,
    purpose: str,
    filename: str,
    bytes: int,
    expires_after_s: float | None,
) -> FileRecord:
    """As of now. `expires_after_s` None: as its purpose has it."""
    now = time.time()
    if expires_after_s is None and purpose == BATCH:
        expires_after_s = BATCH_EXPIRES_S
    return FileRecord(
        id=file,
        owner=owner,
        purpose=purpose,
        filename=filename,
        bytes=bytes,
        created_at=now,
        key=key_of(file),
        expires_at=None if expires_after_s is None else now + expires_after_s,
    )


def discard(storage: Storage, store: Store, file: str) -> None:
    """Raises NotFound where there is none."""
    record = store.files.expire(file)
    try:
        _remove(storage, store, record)
    except StorageUnavailable as error:
        logger.warning("the bytes of %s stay until the next sweep: %s", file, error)


class FirstLine:
    """What can be told of a batch's input while it streams by: its first line that isn't blank.

    All of its lines are checked by the batch's job.
    """

    LONGEST = 2**20  # bytes; of a longer line only this much is looked at

    def __init__(self) -> None:
        self._text = b""
        self._began = self._done = False

    def feed(self, data: bytes) -> None:
        if self._done or not data:
            return
        self._text += data
        if not self._began:
            if len(self._text) < len(_BOM):
                return
            self._text = self._text.removeprefix(_BOM)
            self._began = True
        line, newline, _ = self._text.lstrip().partition(b"\n")
        self._text = line + newline
        self._done = bool(newline) or len(line) > self.LONGEST

    def check(self) -> None:
        """Raises InvalidRequest."""
        text = self._text.strip()
        if not text:
            raise InvalidRequest(
                "The file is empty: a batch needs one request a line.",
                param="file",
                code="empty_file",
            )
        if len(text) > self.LONGEST:
            good = text.startswith(b"{")
        else:
            try:
                good = isinstance(orjson.loads(text), dict)
            except orjson.JSONDecodeError:
                good = False
        if not good:
            raise InvalidRequest(
                "The file is not JSONL: its first line is not a JSON object.",
                param="file",
                code="invalid_json_line",
            )


def check_batch_name(filename: str, param: str = "file") -> None:
    """Raises InvalidRequest."""
    if not filename.lower().endswith(".jsonl"):
        raise InvalidRequest(
            "A file of purpose 'batch' is JSON lines; its name must end in .jsonl.",
            param=param,
            code="invalid_file_format",
        )


def assemble(
    storage: Storage,
    store: Store,
    upload: UploadRecord,
    parts: Sequence[UploadPart],
    md5: str | None,
    once: Once,
) -> UploadRecord:
    """Make a file of these parts, in this order. The upload as it is afterwards: of several at
    once one makes the file. Raises InvalidRequest where the bytes are not what was promised, or
    the upload has ended otherwise; it stays as it was then."""
    file = new_file_id()
    digest = hashlib.md5(usedforsecurity=False)
    first = FirstLine()
    try:
        with storage.writer(key_of(file)) as writer:
            for piece in _joined(storage, store, upload, parts):
                digest.update(piece)
                first.feed(piece)
                writer.write(piece)
            if md5 is not None and digest.hexdigest() != md5.lower():
                raise InvalidRequest(
                    f"The MD5 of the uploaded bytes is {digest.hexdigest()}, not '{md5[:64]}'.",
                    param="md5",
                    code="md5_mismatch",
                )
            if upload.purpose == BATCH:
                first.check()
        record = new_record(
            file, upload.owner, upload.purpose, upload.filename, writer.bytes,
            upload.file_expires_after_s,
        )  # fmt: skip
        made = store.uploads.complete(upload.id, record, once)
    except StoreUnavailable:
        raise
    except BaseException:
        _drop_bytes(storage, file)
        raise
    if made.file_id == file:
        drop_parts(storage, made.id)
    else:
        _drop_bytes(storage, file)
    return made


def _drop_bytes(storage: Storage, file: str) -> None:
    """That no record has."""
    with contextlib.suppress(StorageUnavailable):
        storage.delete(key_of(file))


def _joined(
    storage: Storage, store: Store, upload: UploadRecord, parts: Sequence[UploadPart]
) -> Iterator[bytes]:
    for part in parts:
        try:
            yield from storage.read(part.key)
        except NoSuchObject:  # somebody has ended the upload meanwhile
            check_open(store.uploads.get(upload.id))
            raise


def drop_parts(storage: Storage, upload: str) -> None:
    """Of an upload that has ended. What cannot be deleted now goes with the upload's record."""
    try:
        _drop_parts(storage, upload)
    except StorageUnavailable as error:
        logger.warning("parts of %s stay until it is forgotten: %s", upload, error)


def sweep(storage: Storage, store: Store, now: float) -> int:
    """What has expired goes: files, uploads with their parts, idempotency keys. How many did.

    A bounded number at a time, and safe to run twice at once. Raises StorageUnavailable or
    StoreUnavailable; the next one goes on from there. Bytes go before their record here: nobody
    can see an expired file, and nothing is left over where this is cut off in between.
    """
    gone = 0
    for file in store.files.expired(now, MOST_SWEPT):
        gone += _remove(storage, store, file)
    for upload in store.uploads.overdue(now, MOST_SWEPT):
        store.uploads.expire(upload.id)
        _drop_parts(storage, upload.id)
        gone += 1
    for upload in store.uploads.old(now, MOST_SWEPT):
        _drop_parts(storage, upload.id)  # of a gateway that died before it could
        store.uploads.remove(upload.id)
        gone += 1
    return gone + store.idempotency.forget_old(now)


def sweep_orphans(storage: Storage, store: Store, now: float) -> int:
    """Bytes that got no record in all the time that it takes to make one; how many files'."""
    old = (each for each in storage.list("files/") if each.modified_at < now - ORPHAN_S)
    gone = 0
    while some := list(islice(old, MOST_SWEPT)):
        ids = [each.key.removeprefix("files/") for each in some]
        # What a batch is putting together has an id before it has a record: first, for meanwhile
        # it may get one.
        known = store.batches.open_files()
        known |= store.files.known(ids)
        for file in ids:
            if file not in known:
                storage.delete(key_of(file))
                gone += 1
    return gone


def _remove(storage: Storage, store: Store, file: FileRecord) -> bool:
    storage.delete(file.key)
    try:
        store.files.remove(file.id)
    except NotFound:
        return False  # somebody else did
    return True


def _drop_parts(storage: Storage, upload: str) -> None:
    for part in storage.list(part_key(upload, "")):
        storage.delete(part.key)
