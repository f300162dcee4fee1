"""Parts, put together in the input's order. Blocking; flat memory, as lines lie in a local file."""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import IO, Self

import orjson

from llm_engine.batches import outcomes
from llm_engine.batches.rows import read_rows, split_lines
from llm_engine.records import BatchPart, BatchRecord
from llm_engine.storage.base import CHUNK, NoSuchObject, Storage

#: Of a row's line, in bytes: where a batch's input is read again, it has been checked before.
_ANY_LENGTH = 2**40


class Spool:
    """Every finished row's line, to be had by the row. `with Spool(total) as spool:`"""

    def __init__(self, total: int) -> None:
        self.total = total
        self.completed = self.failed = 0
        self._begins = array("Q", bytes(8 * total))
        self._sizes = array("Q", bytes(8 * total))  # 0: the row has no line
        self._failed = bytearray(total)
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="llm-engine-batch-")
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def collect(self, storage: Storage, parts: Iterable[BatchPart]) -> None:
        """Raises NoSuchObject, StorageUnavailable."""
        for part in parts:
            good = len(part.rows) - part.failed
            lines = split_lines(storage.read(part.key))
            for place, (row, line) in enumerate(zip(part.rows, lines, strict=True)):
                self.add(row, line, failed=place >= good)

    def add(self, row: int, line: bytes, failed: bool) -> None:
        if self._sizes[row]:
            return
        self._file.seek(self._end)
        self._file.write(line)
        self._begins[row], self._sizes[row], self._failed[row] = self._end, len(line), failed
        self._end += len(line)
        self.failed += failed
        self.completed += not failed

    def flush(self) -> None:
        """What does not fit on the disk is told here, and not while the files are written."""
        self._file.flush()

    def missing(self) -> Iterator[int]:
        """Rows without a line."""
        return (row for row in range(self.total) if not self._sizes[row])

    def lines(self, failed: bool | None = None) -> Iterator[bytes]:
        """In the input's order; of all rows, or just those that failed or did not."""
        for row in range(self.total):
            if self._sizes[row] and failed in (None, bool(self._failed[row])):
                self._file.seek(self._begins[row])
                yield self._file.read(self._sizes[row])


def add_unfinished(
    spool: Spool,
    record: BatchRecord,
    storage: Storage,
    input_key: str | None,
    error: dict[str, str],
) -> None:
    """A line with this `error` (code and message) for every row that has none."""
    ids = _custom_ids(storage, input_key)
    following = 0
    for row in list(spool.missing()):
        for _ in range(row - following):
            next(ids)
        following = row + 1
        told = outcomes.failure(record.id, row, next(ids), error["code"], error["message"])
        spool.add(row, told.line, failed=True)


def write(storage: Storage, key: str, lines: Iterable[bytes], check: Callable[[], None]) -> int:
    """One object of all the lines; its bytes. `check` raises where it must not be put in place."""
    with storage.writer(key) as writer:
        held: list[bytes] = []
        size = 0
        for line in lines:
            held.append(line)
            size += len(line)
            if size >= CHUNK:
                writer.write(b"".join(held))
                held, size = [], 0
        writer.write(b"".join(held))
        check()
    return writer.bytes


def _custom_ids(storage: Storage, key: str | None) -> Iterator[str | None]:
    """Of each row; None for ever, where the input is gone."""

    def read() -> Iterator[str | None]:
        if key is None:
            return
        try:
            for row in read_rows(storage.read(key), _ANY_LENGTH):
                yield orjson.loads(row.data or b"{}").get("custom_id")
        except NoSuchObject:
            return

    return chain(read(), repeat(None))
