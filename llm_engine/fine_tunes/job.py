"""A fine-tune, from whatever state it is in to its end. One process a fine-tune, and none that must
live: all that counts is in the store and the storage, and the next job goes on from there.

It trains nothing itself: the trainer's process does (`child.py`), and tells how it gets on.
"""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_engine.config import Settings
from llm_engine.errors import LeaseLost, LLMEngineError, StorageUnavailable
from llm_engine.fine_tunes import adapters
from llm_engine.fine_tunes.child import TRAINER, Trainer, TrainerDied
from llm_engine.fine_tunes.inputs import Inputs, Unfit, bring
from llm_engine.fine_tunes.keeping import Keeping
from llm_engine.fine_tunes.lease import Lease
from llm_engine.fine_tunes.progress import Progress
from llm_engine.fine_tunes.results import data_of, is_told, sentence_of
from llm_engine.fine_tunes.workplace import workplace
from llm_engine.patience import patiently
from llm_engine.records import FineTuneRecord
from llm_engine.statuses import FineTuneState
from llm_engine.storage.base import Storage
from llm_engine.store.sql import Store

TELL_EVERY_S = 5.0
#: Several processes that train together: the same protocol, spoken by their driver.
TRAINERS = (sys.executable, "-m", "jobs.train_workers")
_S = FineTuneState


class Interrupted(Exception):
    """It was told to stop; what has been kept is durable."""


class Job:
    """`run` it. Raises LeaseLost, StoreUnavailable, StorageUnavailable, TrainerDied, Interrupted,
    NotFound, OSError."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        storage: Storage,
        tell: Callable[[str], None],
        trainer: Sequence[str] | None = None,
    ) -> None:
        """`tell`: for the log. `trainer`: the command that trains."""
        self._settings = settings
        self._limits = settings.fine_tunes
        self._store = store
        self._storage = storage
        self._tell = tell
        self._command = trainer or (TRAINER if self._limits.workers == 1 else TRAINERS)
        self._lease = Lease(store, self._limits.lease_s)
        self._progress = Progress()
        self._interrupted = asyncio.Event()
        self._trainer: Trainer | None = None
        self._counted: dict[str, Any] = {}
        self._keeping: Keeping

    def interrupt(self) -> None:
        self._interrupted.set()

    async def run(self, fine_tune: str) -> None:
        await self._lease.claim(fine_tune)
        self._keeping = Keeping(self._limits, self._store, self._storage, self._lease)
        try:
            with workplace(fine_tune) as folder:
                await self._run(folder)
        except LeaseLost:
            await self._sweep()  # it may have been cancelled
            raise
        except StorageUnavailable as away:
            await self._leave(f"its storage is away: {away}", tried=False)
            raise
        except Interrupted:
            await self._leave("its job was told to stop", tried=False)
            raise
        except (TrainerDied, OSError) as died:
            if not await self._give_up(died):
                raise
        if self._lease.record.state.is_final:
            await self._sweep()
        self._tell(_closing(self._lease.record))

    async def _run(self, folder: Path) -> None:
        tasks = [
            asyncio.create_task(each)
            for each in (
                self._work(folder),
                self._lease.keep(lambda: self._progress.plain(self._lease.record)),
                self._report(),
                self._obey(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- beside the work

    async def _obey(self) -> None:
        """Until it is told to stop, or its fine-tune to rest."""
        waits = [
            asyncio.create_task(event.wait()) for event in (self._interrupted, self._lease.paused)
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._trainer is None:
            return await self._stopped()
        self._trainer.stop()
        await asyncio.Event().wait()  # `_work` ends by itself

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            if self._lease.record.state is _S.RUNNING:
                self._tell(self._progress.line(self._lease.record))

    # -- how it ends

    async def _stopped(self) -> None:
        """Another job goes on, sooner or later. Raises Interrupted unless its fine-tune rests."""
        if self._lease.record.state is not _S.PAUSED:
            raise Interrupted
        await self._lease.leave(None, tried=False)

    async def _leave(self, reason: str, tried: bool) -> None:
        with contextlib.suppress(LLMEngineError):
            await self._lease.leave(reason, tried)

    async def _give_up(self, died: Exception) -> bool:
        """Where the trainer has died too often; else another job tries."""
        most = self._limits.max_idle_starts
        if self._lease.record.idle_starts < most:
            await self._leave(f"its trainer died, and is started again: {died}", tried=True)
            return False
        message = (
            f"The trainer died {most} times in a row before one more checkpoint was kept "
            f"(fine_tunes.max_idle_starts); the last time {died}."
        )
        code = died.code if isinstance(died, TrainerDied) else "trainer_failed"
        await self._lease.fail({"code": code, "message": message, "param": None})
        return True

    async def _sweep(self) -> None:
        """What it kept to go on from, if it has ended. What stays is for the keeper's sweep."""
        with contextlib.suppress(LLMEngineError):
            await asyncio.to_thread(
                adapters.sweep_fine_tune, self._store, self._storage, self._lease.record.id
            )

    # -- the work

    async def _work(self, folder: Path) -> None:
        try:
            await self._train(folder)
        except Unfit as unfit:
            await self._lease.fail(unfit.error)

    async def _train(self, folder: Path) -> None:
        record = self._lease.record
        if record.state is _S.VALIDATING:
            await self._lease.tell(f"Validating training file: {record.training_file_id}")
        inputs = await patiently(bring, self._settings, self._store, self._storage, record, folder)
        resume = await self._keeping.resume(folder / "resume")
        await self._tell_of_resumption()
        spec = self._spec(inputs, folder / "out", resume)
        cpus = self._limits.num_cpus
        async with Trainer(spec, self._tell, self._command, cpus) as self._trainer:
            if self._interrupted.is_set() or self._lease.paused.is_set():
                self._trainer.stop()
            async for event in self._trainer.events():
                await self._hear(event)

    def _spec(self, inputs: Inputs, out: Path, resume: Path | None) -> dict[str, Any]:
        record = self._lease.record
        out.mkdir(exist_ok=True)
        asked = {k: v for k, v in record.hyperparameters.items() if k != "validation_split"}
        return {
            "weights": inputs.weights,
            "parent": None if inputs.parent is None else str(inputs.parent),
            "train": str(inputs.train),
            "valid": None if inputs.valid is None else str(inputs.valid),
            "method": record.method,
            "asked": asked,
            "seed": record.seed,
            "out": str(out),
            "resume": None if resume is None else str(resume),
            "limits": {"max_length": self._limits.max_length},
            "checkpoint_every_s": self._limits.checkpoint_every_s,
            "workers": self._limits.workers,
            "cpus": self._limits.num_cpus,  # of each of them
            "gpus": self._limits.num_gpus,
            # For the model card.
            "name": record.name,
            "base": record.base,
        }

    async def _tell_of_resumption(self) -> None:
        kept = self._keeping.kept
        self._progress.begin(self._keeping.step, self._keeping.tokens)
        if self._lease.record.state is _S.RUNNING:
            await self._lease.tell(
                "Training starts again from the beginning: no checkpoint had been kept"
                if kept is None
                else f"Training goes on from the checkpoint at step {kept.step}"
            )

    async def _hear(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "waiting":
                if event["reason"] != self._lease.record.reason:
                    await self._lease.note(reason=event["reason"])
            case "counted":
                self._counted = event
            case "planned":
                await self._start(event["plan"])
            case "step":
                await self._step(event)
            case "checkpoint":
                await self._keeping.keep(event)
                await asyncio.to_thread(shutil.rmtree, event["path"], ignore_errors=True)
            case "done":
                await self._lease.beat(self._progress.plain(self._lease.record))
                await self._keeping.finish(event)
            case "stopped":
                if event.get("path") and event["step"] > self._keeping.step:
                    plan = self._lease.record.plan
                    assert plan is not None
                    per_epoch = plan["total_steps"] // plan["n_epochs"]
                    ends = event["step"] % per_epoch == 0
                    await self._keeping.keep(event | {"epoch_end": ends})
                await self._stopped()
            case "failed":
                raise Unfit(
                    event.get("code") or "invalid_training_file",
                    _with_line(event),
                    event.get("param"),
                )

    async def _start(self, plan: dict[str, Any]) -> None:
        facts = {"plan": plan, "total_steps": plan["total_steps"], "reason": None}
        record = self._lease.record
        if record.state is _S.VALIDATING:
            await self._tell_of_length(plan)
            message = "Files validated, moving job to queued state"
            await self._lease.move(_S.VALIDATING, _S.QUEUED, message, **facts)
        elif any(getattr(record, name) != value for name, value in facts.items()):
            await self._lease.note(**facts)
        if self._lease.record.state is _S.QUEUED:
            message = (
                f"Training goes on from the checkpoint at step {self._keeping.step}"
                if self._keeping.step
                else "Fine-tuning job started"
            )
            await self._lease.move(_S.QUEUED, _S.RUNNING, message)
        self._progress.begin(self._keeping.step, self._keeping.tokens)

    async def _tell_of_length(self, plan: dict[str, Any]) -> None:
        count = self._counted.get("n_too_long", 0)
        if not count:
            return
        lines = self._counted.get("too_long", [])
        named = ", ".join(map(str, lines)) + (", ..." if len(lines) < count else "")
        await self._lease.tell(
            f"{count} of {plan['examples']} examples are longer than {plan['max_length']} tokens, "
            f"and are cut there; by their lines: {named}",
            level="warn",
        )

    async def _step(self, event: dict[str, Any]) -> None:
        if event["step"] <= self._keeping.step:
            return
        if self._lease.record.state is _S.QUEUED:  # resumed before it had noticed that it rests
            await self._lease.move(_S.QUEUED, _S.RUNNING, "Training goes on")
        total = self._lease.record.total_steps
        self._progress.saw(event)
        self._keeping.count(event)
        if is_told(event, total):
            facts = data_of({"total_steps": total} | event)
            await self._lease.tell(sentence_of(event, total), data=facts)


def _with_line(event: dict[str, Any]) -> str:
    message, line = event.get("message") or "The trainer refused it.", event.get("line")
    return f"Line {line}: {message}" if line and f"line {line}" not in message.lower() else message


def _closing(record: FineTuneRecord) -> str:
    text = f"{record.id} {record.state} at step {record.step}/{record.total_steps}"
    if record.state is _S.SUCCEEDED:
        text += f"; the model is {record.name}, its metrics are in {record.result_file_id}"
    if record.error is not None:
        text += f". {record.error['message']}"
    return text
