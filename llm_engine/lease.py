"""A job's claim on its record: what it writes to the store while it may, and its heartbeat."""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any, Generic

from llm_engine.errors import LeaseLost
from llm_engine.patience import patiently
from llm_engine.store.leased import Leased, Record

BEATS_A_LEASE = 5


class Lease(Generic[Record]):
    """`record` is as it was last seen. Every method raises LeaseLost once another process works on
    it, and StoreUnavailable where the store has been away for too long."""

    def __init__(self, records: Leased[Record], lease_s: float) -> None:
        self.record: Record
        self.tag = secrets.token_hex(4)  # of this process, in the names of what it writes
        self.worker = f"{socket.gethostname()[:50]}:{os.getpid()}:{self.tag}"
        self._records = records
        self._lease_s = lease_s
        self._ending = asyncio.Lock()  # a beat that comes just after the end finds no lease
        self._left = False

    async def claim(self, record: str) -> None:
        """Raises NotFound, too."""

        def claim() -> Record:
            found = self._records.get(record)
            if found.worker == self.worker:  # the first try has done it, unheard
                return found
            return self._records.claim(record, self.worker, self._lease_s)

        self.record = await patiently(claim)
        self._saw(self.record)

    async def beat(self, progress: dict[str, float] | None = None) -> None:
        self._saw(await patiently(self._records.beat, self.record, self._lease_s, progress))

    async def keep(self, progress: Callable[[], dict[str, float]]) -> None:
        """For ever; in silence once the record has ended, or been left."""
        while True:
            await asyncio.sleep(self._lease_s / BEATS_A_LEASE)
            async with self._ending:
                if not (self._left or self.record.state.is_final):
                    await self.beat(progress())

    def check(self) -> None:
        """Blocking; for the thread that is about to put a result in its place."""
        self._records.beat(self.record, self._lease_s)

    async def note(self, **values: Any) -> None:
        self._saw(await patiently(lambda: self._records.note(self.record, **values)))

    def _saw(self, record: Record) -> None:
        if record.worker not in (self.worker, None):
            raise LeaseLost(f"another process works on {record.id}")
        if record.revision >= self.record.revision:  # two answers may overtake each other
            self.record = record
