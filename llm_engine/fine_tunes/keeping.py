"""What a job makes durable of its fine-tune: checkpoints, those of them that can be served, and in
the end the adapter with the result file. A second try, by whatever job, does no harm."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_engine.config_data import FineTuneSettings
from llm_engine.errors import Conflict, LeaseLost, StorageUnavailable, StoreUnavailable
from llm_engine.files import new_file_id, new_record
from llm_engine.fine_tunes import adapters, results
from llm_engine.fine_tunes.checkpoints import Checkpoint, Checkpoints
from llm_engine.fine_tunes.child import TrainerDied
from llm_engine.fine_tunes.lease import Lease
from llm_engine.fine_tunes.names import checkpoint_name
from llm_engine.patience import patiently
from llm_engine.records import AdapterRecord
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.sql import Store


class Keeping:
    """Raises LeaseLost, StoreUnavailable, StorageUnavailable, TrainerDied, and OSError."""

    def __init__(
        self, limits: FineTuneSettings, store: Store, storage: Storage, lease: Lease
    ) -> None:
        self.kept: Checkpoint | None = None  # the newest
        self._limits = limits
        self._store = store
        self._storage = storage
        self._lease = lease
        self._checkpoints = Checkpoints(storage, lease.record.id, lease.tag)
        self._rows = results.Rows()  # since then
        self._tokens = 0  # trained on so far
        self._measured: dict[str, float] = {}  # by the last step

    @property
    def step(self) -> int:
        """Up to which all is durable."""
        return 0 if self.kept is None else self.kept.step

    @property
    def tokens(self) -> int:
        return 0 if self.kept is None else self.kept.tokens

    def count(self, event: dict[str, Any]) -> None:
        """A step."""
        self._rows.add(event)
        self._measured = {k: v for k, v in event.items() if k.startswith(("train_", "valid_"))}
        self._tokens = event.get("tokens") or self._tokens

    async def resume(self, folder: Path) -> Path | None:
        """The newest checkpoint, in a folder of this machine."""
        damaged: list[str] = []
        while (found := await patiently(self._checkpoints.newest, damaged)) is not None:
            target = folder / str(len(damaged))
            if await patiently(self._checkpoints.fetch, found, target):
                await self._made(found, target, new=found.step > self._lease.record.step)
                return target
            damaged.append(found.prefix)
            message = f"The checkpoint at step {found.step} is damaged and cannot be used"
            await self._lease.tell(message, level="warn")
        return None

    async def keep(self, event: dict[str, Any]) -> None:
        """What the trainer tells of a checkpoint."""
        step, folder = event["step"], Path(event["path"])

        def put() -> Checkpoint:
            return self._checkpoints.put(
                folder,
                step,
                epoch_end=bool(event.get("epoch_end")),
                metrics=_numbers(event.get("metrics") or self._measured),
                history=() if self.kept is None else self.kept.history,
                rows=self._rows.up_to(step),
                tokens=self._tokens,
                check=self._lease.check,
            )

        new = step >= self._lease.record.step  # else: a checkpoint has been lost since then
        await self._made(await patiently(put), folder, new)

    async def finish(self, event: dict[str, Any]) -> None:
        """What the trainer tells of its end."""
        record = self._lease.record
        adapter = await self._publish(Path(event["path"]), record.name, None, event)
        key = f"fine_tunes/{record.id}/results.csv"
        history = () if self.kept is None else self.kept.history

        def write() -> int:
            return results.write(self._storage, key, history, self._rows.all(), self._lease.check)

        try:
            size = await patiently(write)
            file = new_record(
                new_file_id(), record.owner, results.PURPOSE, results.FILENAME, size, None
            )
            tokens = event.get("trained_tokens") or self._tokens
            await self._lease.finish(adapter, replace(file, key=key), tokens)
        except NoSuchObject as gone:
            await self._lease.beat()  # another one may have ended it, and deleted them
            raise TrainerDied(f"metrics that had been kept are gone: {gone}") from None
        except LeaseLost:
            await self._drop(adapter)
            raise

    async def _made(self, checkpoint: Checkpoint, folder: Path, new: bool) -> None:
        """It is in the storage: now the store is told. `new`: it has not been told before."""
        record = self._lease.record
        adapter = None
        if checkpoint.epoch_end and new:
            name = checkpoint_name(record.name, checkpoint.step)
            facts = {"metrics": checkpoint.metrics}
            adapter = await self._publish(folder, name, checkpoint.step, facts)
        try:
            await self._lease.keep_step(checkpoint.step, adapter)
        except LeaseLost:
            await self._drop(adapter)
            raise
        self.kept, self._tokens = checkpoint, checkpoint.tokens
        self._rows.forget(checkpoint.step)
        await patiently(self._prune, checkpoint)

    async def _publish(
        self, folder: Path, name: str, step: int | None, event: dict[str, Any]
    ) -> AdapterRecord:
        record = self._lease.record
        try:
            size, rank = adapters.measure(folder)
        except ValueError as error:
            raise TrainerDied(str(error)) from None
        adapter = AdapterRecord(
            id=adapters.new_adapter_id(),
            name=name,
            owner=record.owner,
            base=record.base,
            weights=record.weights,
            rank=rank,
            bytes=size,
            created_at=time.time(),
            fine_tune=record.id,
            step=step,
            metrics=_numbers(event.get("metrics")),
        )
        await patiently(adapters.publish, self._storage, folder, adapter)
        return adapter

    async def _drop(self, adapter: AdapterRecord | None) -> None:
        """Unless it is on record, by a try whose answer was lost."""
        if adapter is None:
            return
        with contextlib.suppress(StorageUnavailable, StoreUnavailable):
            if await asyncio.to_thread(self._store.adapters.find, adapter.id) is None:
                await patiently(adapters.drop, self._storage, adapter.id, patience_s=10)

    def _prune(self, checkpoint: Checkpoint) -> None:
        """What the newest one makes needless."""
        self._checkpoints.drop_older(checkpoint)
        served = [a for a in self._store.adapters.of(self._lease.record.id) if a.step is not None]
        for each in served[: -self._limits.kept_checkpoints]:
            with contextlib.suppress(Conflict):  # somebody has named it, and needs it
                self._store.adapters.delete(each.id)


def _numbers(metrics: Any) -> dict[str, float]:
    known = metrics.items() if isinstance(metrics, dict) else ()
    return {str(name): value for name, value in known if isinstance(value, int | float)}
