"""A batch, from whatever state it is in to its end. One process a batch, and none that must live:
all that counts is in the store and the storage, and the next job goes on from there."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from urllib.parse import quote

from llm_engine.batches.conclusion import Conclusion
from llm_engine.batches.gateways import Answer, Broken, Gateways, Unreachable
from llm_engine.batches.lease import Lease
from llm_engine.batches.own_engine import EngineFailed, OwnEngine
from llm_engine.batches.parts import Parts
from llm_engine.batches.progress import Progress
from llm_engine.batches.rows import read_rows
from llm_engine.batches.runner import GRACE_S, Runner, Stop, Tickets
from llm_engine.batches.validation import Check, Problem, problem
from llm_engine.config import Settings
from llm_engine.errors import LLMEngineError, NotFound, StorageUnavailable, StoreUnavailable
from llm_engine.lease import BEATS_A_LEASE
from llm_engine.patience import backoff, patiently
from llm_engine.records import BatchRecord, FileRecord
from llm_engine.signing import Signer
from llm_engine.statuses import BatchState
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.sql import Store

TELL_EVERY_S = 5.0


class Interrupted(Exception):
    """It was told to stop; what has finished is durable."""


class Job:
    """`run` it. Raises LeaseLost, StoreUnavailable, StorageUnavailable, Interrupted, NotFound."""

    def __init__(
        self,
        settings: Settings,
        gateways: list[str],
        store: Store,
        storage: Storage,
        tell: Callable[[str], None],
    ) -> None:
        """`tell`: for the log. Raises ConfigError for gateways that can't be."""
        timeout_s = settings.gateway.request_timeout_s + GRACE_S
        self._settings = settings
        self._store = store
        self._storage = storage
        self._gateways = Gateways(gateways, timeout_s)
        self._tell = tell
        self._lease = Lease(store, settings.batches.lease_s)
        self._engine = OwnEngine(store, settings, self._lease)
        self._progress = Progress()
        self._interrupted = asyncio.Event()
        self._runner: Runner | None = None
        self._tickets: Tickets

    def interrupt(self) -> None:
        self._interrupted.set()

    async def run(self, batch: str) -> None:
        await self._lease.claim(batch)
        secret = await patiently(self._store.database.secret)
        self._tickets = Tickets(Signer(secret), self._lease.record)
        tasks = [
            asyncio.create_task(each)
            for each in (self._work(), self._lease.keep(self._look), self._report(), self._obey())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except StorageUnavailable as away:
            with contextlib.suppress(LLMEngineError):
                await self._lease.leave(f"its storage is away: {away}")
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._gateways.close()

    # -- beside the work

    async def _obey(self) -> None:
        await self._interrupted.wait()
        if self._runner is None:
            raise Interrupted
        self._runner.stop(Stop("interrupted"))
        await asyncio.Event().wait()  # `_work` ends by itself

    def _look(self) -> dict[str, float]:
        """What each heartbeat tells."""
        self._progress.look()
        pace = self._runner and self._runner.pace
        return self._progress.plain(self._lease.record, pace.in_flight if pace else 0)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            if self._lease.record.state is BatchState.IN_PROGRESS:
                self._tell(self._progress.line(self._lease.record))

    # -- the work

    async def _work(self) -> None:
        while not self._lease.record.state.is_final:
            match self._lease.record.state:
                case BatchState.VALIDATING:
                    await self._validate()
                case BatchState.IN_PROGRESS:
                    await self._run_rows()
                case _:
                    await self._conclude()
        self._tell(_closing(self._lease.record))

    async def _conclude(self) -> None:
        if self._lease.record.options.own_engine is not None:
            await self._engine.delete()
        conclusion = Conclusion(self._settings, self._store, self._storage, self._lease)
        await conclusion.write()

    async def _fail(self, *errors: Problem) -> None:
        """Before any row has run."""
        reason = errors[0]["message"]
        if len(errors) > 1:
            reason = f"The input file has errors; the first: {reason}"
        await self._lease.finish(BatchState.FAILED, [], errors=list(errors), reason=reason)

    async def _validate(self) -> None:
        record = self._lease.record
        if record.options.input_path is not None:
            from llm_engine.batches import by_path  # late: it brings a whole dialect along

            refused = await by_path.bring(self._settings, self._store, self._storage, self._lease)
            if refused is not None:
                return await self._fail(refused)
            record = self._lease.record  # it is known by now which endpoint its rows are for
        file = await self._input()
        if file is None:
            return await self._fail(_no_file(record))
        most = self._settings.batches.max_file_bytes
        if file.bytes > most:
            return await self._fail(
                problem(
                    "file_too_large",
                    f"The input file has {file.bytes} bytes, more than {most} "
                    "(batches.max_file_bytes).",
                    "file_id",
                )
            )
        try:
            check = await patiently(self._check, record, file)
        except NoSuchObject:
            return await self._fail(_no_file(record))
        problems = check.problems()
        if not problems and record.options.own_engine is None:
            problems = await self._check_model(check)
        if self._lease.cancelled.is_set():
            return
        if problems:
            return await self._fail(*problems)
        await self._lease.move(
            BatchState.VALIDATING,
            BatchState.IN_PROGRESS,
            total=check.total,
            model=record.model or check.model,
            reason=None,
        )

    def _check(self, record: BatchRecord, file: FileRecord) -> Check:
        check = Check(record, self._settings)
        longest = self._settings.gateway.max_body_bytes
        check.feed(read_rows(self._storage.read(file.key), longest))
        return check

    async def _check_model(self, check: Check) -> list[Problem]:
        """Asks the gateways, for as long as it takes them to answer."""
        assert check.model is not None
        path = f"/v1/models/{quote(check.model, safe='')}"
        tries = 0
        while not self._lease.cancelled.is_set():
            with contextlib.suppress(Unreachable, Broken):
                answer = await self._gateways.get(path, self._tickets.text)
                if answer.status == 404 and b"model_not_found" in answer.body:
                    message = f"The model '{check.model}' does not exist or you cannot use it."
                    told = problem("model_not_found", message, "body.model", check.model_line)
                    return [told]
                if not may_change(answer):
                    break  # there is such a model; or its rows will be told what is wrong
            if time.time() >= self._lease.record.expires_at:
                break  # its rows will be told
            tries += 1
            if tries == 3:
                await self._lease.note(reason="no gateway answers")
            await asyncio.sleep(backoff(tries, 5.0))
        return []

    async def _input(self) -> FileRecord | None:
        """None where there is none that its owner may use."""
        record = self._lease.record
        try:
            file = await patiently(self._store.files.get, record.input_file_id)
        except NotFound:
            return None
        return file if file.owner == record.owner or record.sees_all else None

    async def _run_rows(self) -> None:
        record = self._lease.record
        known = await patiently(self._store.batches.parts, record.id)
        parts = Parts(self._lease, self._storage, record.total, known)
        stop = await self._until_stopped(parts)
        if stop is not None and stop.outcome == "interrupted":
            raise Interrupted
        stop = stop or Stop("completed")
        ran = self._lease.record.completed + self._lease.record.failed
        if stop.errors and not ran:
            if record.options.own_engine is not None:
                await self._engine.delete()
            return await self._fail(*stop.errors)
        await self._lease.move(
            BatchState.IN_PROGRESS,
            BatchState.FINALIZING,
            outcome=stop.outcome,
            reason=stop.errors[0]["message"] if stop.errors else None,
            errors=list(stop.errors),
        )

    async def _until_stopped(self, parts: Parts) -> Stop | None:
        """Rows run until all have, or something keeps them from it."""
        record = self._lease.record
        file = await self._input()
        if file is None:
            return Stop("failed", (_no_file(record),))
        own = record.options.own_engine is not None
        runner = Runner(
            record,
            file,
            settings=self._settings,
            storage=self._storage,
            gateways=self._gateways,
            tickets=self._tickets,
            parts=parts,
            progress=self._progress,
        )
        watchers = [self._stop_in_time(runner), self._stop_if_cancelled(runner)]
        if not own:
            watchers.append(self._steer(runner))
        tasks = [asyncio.create_task(each) for each in watchers]

        async def start_engine() -> None:
            await self._engine.start()
            tasks.append(asyncio.create_task(self._stop_if_failed(runner)))

        self._runner = runner
        try:
            await runner.run(start_engine if own else None)
        except NoSuchObject:
            return Stop("failed", (_no_file(record),))
        except EngineFailed as failed:
            return _engine_failed(failed)
        finally:
            self._runner = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return runner.stopped

    async def _stop_in_time(self, runner: Runner) -> None:
        while (left_s := self._lease.record.expires_at - time.time()) > 0:
            await asyncio.sleep(min(left_s, 60.0))  # a clock may be set
        runner.stop(Stop("expired"))

    async def _stop_if_cancelled(self, runner: Runner) -> None:
        await self._lease.cancelled.wait()
        runner.stop(Stop("cancelled"))

    async def _stop_if_failed(self, runner: Runner) -> None:
        try:
            await self._engine.watch()
        except EngineFailed as failed:
            runner.stop(_engine_failed(failed))

    async def _steer(self, runner: Runner) -> None:
        """By who else uses the model, by the time that is left, and by what the batch waits for."""
        while True:
            with contextlib.suppress(StoreUnavailable):
                open_ones = await asyncio.to_thread(self._store.batches.open)
                runner.pace.batches = max(1, sum(map(self._is_neighbour, open_ones)))
            record = self._lease.record
            runner.hurry(record.total - record.completed - record.failed)
            if runner.waiting_for != record.reason:
                await self._lease.note(reason=runner.waiting_for)
            await asyncio.sleep(self._settings.batches.lease_s / BEATS_A_LEASE)

    def _is_neighbour(self, other: BatchRecord) -> bool:
        """Whether its rows go where ours do, ours included."""
        return (
            other.state is BatchState.IN_PROGRESS
            and other.model == self._lease.record.model
            and other.options.own_engine is None
            and other.worker is not None
        )


def may_change(answer: Answer) -> bool:
    """Whether there may be another one later, or from another gateway."""
    if answer.status == 404:
        return not answer.body.startswith(b"{")  # not a gateway's own
    return answer.status in (401, 408, 429) or answer.status >= 500


def _engine_failed(failed: EngineFailed) -> Stop:
    message = f"The batch cannot go on: {failed}."
    return Stop("completed", (problem("model_unavailable", message),))


def _no_file(record: BatchRecord) -> Problem:
    message = f"The input file '{record.input_file_id}' does not exist or has been deleted."
    return problem("invalid_request", message, "file_id")


def _closing(record: BatchRecord) -> str:
    text = f"{record.id} {record.state}: {record.completed:,} rows done, {record.failed:,} failed"
    files = [file for file in (record.output_file_id, record.error_file_id) if file]
    if files:
        text += f"; see {' and '.join(files)}"
    return f"{text}. {record.reason}" if record.reason else text
