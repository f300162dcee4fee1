"""Finished rows on their way into the storage. A row counts as done once its part is in the store.

Lines of a part stand in the order of its `rows`, those of failed rows at its end.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence

from llm_engine.batches.lease import Lease
from llm_engine.batches.outcomes import Finished
from llm_engine.errors import LeaseLost, NotFound, StorageUnavailable, StoreUnavailable
from llm_engine.patience import patiently
from llm_engine.records import BatchPart, BatchRecord, Usage
from llm_engine.statuses import BatchState
from llm_engine.storage.base import Storage
from llm_engine.store.sql import Store

#: A part is written when so large a share of the rows, so many bytes, or so old a row waits for it:
#: whatever kills the job costs less than a hundredth of the batch, and parts stay few.
SHARE = 200
MOST_BYTES = 8 * 2**20
OLDEST_S = 5.0
#: No row is sent while so many finished ones wait: the storage is slow, or away.
MOST_WAITING_SHARE = 100
MOST_WAITING_BYTES = 64 * 2**20
#: Rows of a batch that was given up are in no file: its operators may want them.
GIVEN_UP_S = 30 * 86400


def folder_of(batch: str) -> str:
    """Where the parts of a batch lie in the storage."""
    return f"batches/{batch}/parts/"


def sweep(store: Store, storage: Storage) -> int:
    """Blocking, once in a while: deletes parts of batches that have ended, whose job was killed
    before it could. How many."""
    ended: dict[str, bool] = {}
    swept = 0
    for each in storage.list("batches/"):
        batch, _, rest = each.key.removeprefix("batches/").partition("/")
        if not rest.startswith("parts/"):
            continue
        if batch not in ended:
            try:
                ended[batch] = _needs_none(store.batches.get(batch))
            except NotFound:
                ended[batch] = True
        if ended[batch]:
            storage.delete(each.key)
            swept += 1
    return swept


def _needs_none(record: BatchRecord) -> bool:
    has_rows = record.completed + record.failed > 0
    if record.state is BatchState.FAILED and has_rows:
        in_files = record.output_file_id or record.error_file_id
        return bool(in_files) or (record.began(record.state) or 0.0) + GIVEN_UP_S < time.time()
    return record.state.is_final


class Parts:
    """`add` what has finished; `run` writes it. `done[row]` is 1 for rows that need not run."""

    def __init__(
        self, lease: Lease, storage: Storage, total: int, known: Sequence[BatchPart]
    ) -> None:
        self.done = bytearray(total)
        for part in known:
            for row in part.rows:
                self.done[row] = 1
        self.waiting = 0  # finished rows that are not durable yet
        self._bytes = 0  # of those
        self._number = max((part.number for part in known), default=0)
        self._lease = lease
        self._storage = storage
        self._held: list[Finished] = []
        self._held_bytes = 0
        self._began = time.monotonic()
        self._flush_rows = max(1, total // SHARE)
        self._most_waiting = max(4, total // MOST_WAITING_SHARE)
        self._any = asyncio.Event()
        self._due = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._flushing = asyncio.Lock()
        self._failure: Exception | None = None

    def add(self, finished: Finished) -> None:
        self._held.append(finished)
        self._held_bytes += len(finished.line)
        self._bytes += len(finished.line)
        self.waiting += 1
        self._any.set()
        if len(self._held) >= self._flush_rows or self._held_bytes >= MOST_BYTES:
            self._due.set()
        if self.waiting >= self._most_waiting or self._bytes >= MOST_WAITING_BYTES:
            self._room.clear()

    async def room(self) -> None:
        """Wait while too much would be lost with the job."""
        await self._room.wait()

    async def run(self) -> None:
        """For ever; `flush` writes the rest. Raises what the storage and the lease do; after that
        nothing is written any more, for what the failed part has become is not known."""
        while True:
            await self._any.wait()
            # In a batch of days, rows that finish one by one would else make a part each.
            oldest = max(OLDEST_S, (time.monotonic() - self._began) / SHARE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), oldest)
            await self.flush()

    async def flush(self) -> None:
        async with self._flushing:
            if self._failure is not None:
                raise self._failure
            rows = sorted(self._held, key=lambda each: each.failed)
            self._held, self._held_bytes = [], 0
            self._any.clear()
            self._due.clear()
            if rows:
                try:
                    await self._write(rows)
                except Exception as error:
                    self._failure = error
                    raise

    async def _write(self, rows: list[Finished]) -> None:
        number = self._number + 1
        part = BatchPart(
            number,
            f"{folder_of(self._lease.record.id)}{number:06d}-{self._lease.tag}.jsonl",
            tuple(each.row for each in rows),
            sum(each.failed for each in rows),
            sum((each.usage for each in rows), Usage()),
        )
        data = b"".join(each.line for each in rows)
        await patiently(self._storage.put, part.key, data)
        try:
            await self._lease.add_part(part)
        except LeaseLost:
            with contextlib.suppress(StorageUnavailable, StoreUnavailable):
                if not await self._lease.has(part):
                    await asyncio.to_thread(self._storage.delete, part.key)
            raise
        self._number = number
        for each in rows:
            self.done[each.row] = 1
        self.waiting -= len(rows)
        self._bytes -= len(data)
        if self.waiting < self._most_waiting and self._bytes < MOST_WAITING_BYTES:
            self._room.set()
