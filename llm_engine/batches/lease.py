"""A job's claim on its batch: what only batches need beside heartbeats."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from llm_engine import lease
from llm_engine.errors import NotFound
from llm_engine.patience import patiently
from llm_engine.records import BatchPart, BatchRecord, FileRecord
from llm_engine.statuses import BatchState
from llm_engine.store.sql import Store


class Lease(lease.Lease[BatchRecord]):
    def __init__(self, store: Store, lease_s: float) -> None:
        super().__init__(store.batches, lease_s)
        self.cancelled = asyncio.Event()
        self._batches = store.batches
        self._files = store.files

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

    async def has(self, part: BatchPart) -> bool:
        """Whether it is on record, by a try whose answer was lost."""
        known = await asyncio.to_thread(self._batches.parts, self.record.id)
        return any(each.key == part.key for each in known)

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
        super()._saw(record)
        if record.state is BatchState.CANCELLING:
            self.cancelled.set()
