"""A job's claim on its fine-tune: its states, events, checkpoints and end."""

import asyncio
from collections.abc import Mapping
from typing import Any

from llm_engine import lease
from llm_engine.patience import patiently
from llm_engine.records import AdapterRecord, FileRecord, FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.store.sql import Store


class Lease(lease.Lease[FineTuneRecord]):
    """Besides LeaseLost and StoreUnavailable, nothing is raised. Cancelled is lost, too."""

    def __init__(self, store: Store, lease_s: float) -> None:
        super().__init__(store.fine_tunes, lease_s)
        self.paused = asyncio.Event()
        self._fine_tunes = store.fine_tunes

    async def move(
        self, from_: FineTuneState, to: FineTuneState, message: str, **values: Any
    ) -> None:
        """Look at `record.state` afterwards: it may have been paused instead."""

        def move() -> FineTuneRecord | None:
            return self._fine_tunes.move(self.record, [from_], to, message, **values)

        moved = await patiently(move)
        if moved is None:
            await self.beat()
        else:
            self._saw(moved)

    async def tell(
        self, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        def tell() -> None:
            self._fine_tunes.tell(self.record, message, level=level, data=data)

        await patiently(tell)

    async def keep_step(self, step: int, checkpoint: AdapterRecord | None = None) -> None:
        self._saw(await patiently(self._fine_tunes.keep, self.record, step, checkpoint))

    async def finish(
        self, adapter: AdapterRecord, results: FileRecord, trained_tokens: int
    ) -> None:
        again = False

        def finish() -> FineTuneRecord:
            nonlocal again
            if again and (found := self._ended()) and found.adapter == adapter.id:
                return found
            again = True
            return self._fine_tunes.finish(self.record, adapter, results, trained_tokens)

        async with self._ending:
            self._saw(await patiently(finish))

    async def fail(self, error: Mapping[str, Any]) -> None:
        again = False

        def fail() -> FineTuneRecord:
            nonlocal again
            if again and (found := self._ended()) and found.error == error:
                return found
            again = True
            return self._fine_tunes.fail(self.record, error)

        async with self._ending:
            self._saw(await patiently(fail))

    async def leave(self, reason: str | None, tried: bool) -> None:
        """Another job may claim it."""
        async with self._ending:
            self._left = True
            await asyncio.to_thread(self._fine_tunes.leave, self.record, reason, tried)

    def _ended(self) -> FineTuneRecord | None:
        """As the first try has left it, unheard."""
        found = self._fine_tunes.get(self.record.id)
        return found if found.state.is_final else None

    def _saw(self, record: FineTuneRecord) -> None:
        super()._saw(record)
        if self.record.state is FineTuneState.PAUSED:
            self.paused.set()
