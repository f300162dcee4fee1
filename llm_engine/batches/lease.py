"""A job's claim on its batch: what it writes to the store, as long as it may, and its heartbeat."""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_engine.batches.patience import patiently
from llm_engine.errors import LeaseLost, NotFound
from llm_engine.records import BatchPart, BatchRecord, FileRecord
from llm_engine.statuses import BatchState
from llm_engine.store.sql import Store

BEATS_A_LEASE = 5


class Lease:
    """`record` is the batch as it was last seen. Every method raises LeaseLost once another process
    works on it, and StoreUnavailable where the store has been away for too long."""

    def __init__(self, store: Store, lease_s: float) -> None:
        self.record: BatchRecord
        self.tag = secrets.token_hex(4)  # of this process, in the names of what it writes
        self.worker = f"{socket.gethostname()[:50]}:{os.getpid()}:{self.tag}"
        self.cancelled = asyncio.Event()
        self._ending = asyncio.Lock()  # a beat that comes just after the end finds no lease
        self._batches = store.batches
        self._files = store.files
        self._lease_s = lease_s

    async def claim(self, batch: str) -> None:
        """Raises NotFound, too."""

        def claim() -> BatchRecord:
            found = self._batches.get(batch)
            if found.worker == self.worker:  # the first try has done it, unheard
                return found
            return self._batches.claim(batch, self.worker, self._lease_s)

        self.record = await patiently(claim)
        self._saw(self.record)

    async def beat(self, progress: dict[str, float] | None = None) -> None:
        self._saw(await patiently(self._batches.beat, self.record, self._lease_s, progress))

    async def keep(self, progress: Callable[[], dict[str, float]]) -> None:
        """For ever; in silence once the batch has ended."""
        while True:
            await asyncio.sleep(self._lease_s / BEATS_A_LEASE)
            async with self._ending:
                if not self.record.state.is_final:
                    await self.beat(progress())

    def check(self) -> None:
        """Blocking; for the thread that is about to put a result in its place."""
        self._batches.beat(self.record, self._lease_s)

    async def note(self, **values: Any) -> None:
        self._saw(await patiently(lambda: self._batches.note(self.record, **values)))

    async def move(self, from_: BatchState, to: BatchState, **values: Any) -> None:
        """Look at `record.state` afterwards: it may have been cancelled instead."""

        def move() -> BatchRecord | None:
            return self._batches.move(self.record, [from_], to, **values)

        moved = await patiently(move)
        if moved is None:
            await self.beat()
        else:
            self._saw(moved)

    async def add_part(self, part: BatchPart) -> None:
        self._saw(await patiently(self._batches.add_part, self.record, part))

    async def finish(self, to: BatchState, results: Sequence[FileRecord], **values: Any) -> None:
        again = False

        def finish() -> BatchRecord:
            nonlocal again
            if again:
                found = self._batches.get(self.record.id)
                if found.state.is_final and all(self._is_kept(each) for each in results):
                    return found  # the first try has done it, unheard
            again = True
            return self._batches.finish(self.record, to, results, **values)

        async with self._ending:
            self._saw(await patiently(finish))

    async def leave(self, reason: str) -> None:
        """For no fault of the batch's or the job's; which counts all the same once its time is
        over, lest it never end."""
        tried = self.record.expires_at < time.time()
        await asyncio.to_thread(self._batches.leave, self.record, reason, tried)

    def _is_kept(self, result: FileRecord) -> bool:
        try:
            return self._files.get(result.id) is not None
        except NotFound:
            return False

    def _saw(self, record: BatchRecord) -> None:
        if record.worker not in (self.worker, None):
            raise LeaseLost(f"another process works on {record.id}")
        if record.revision >= self.record.revision:  # two answers may overtake each other
            self.record = record
        if record.state is BatchState.CANCELLING:
            self.cancelled.set()
