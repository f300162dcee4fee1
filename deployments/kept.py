"""What the JobKeeper looks after: all batches, and all fine-tunes. One class a kind: its jobs, its
limits, its words. What is done about a record is decided in `llm_engine/keeping.py`."""

import logging
import time
from typing import Generic

from jobs.launcher import Launcher, LaunchError
from llm_engine.batches import parts
from llm_engine.config import Settings
from llm_engine.config_data import BatchSettings, FineTuneSettings
from llm_engine.errors import StorageUnavailable
from llm_engine.fine_tunes import adapters
from llm_engine.keeping import Deed, Seen, decide
from llm_engine.records import BatchRecord, FineTuneRecord
from llm_engine.statuses import BatchState, FineTuneState
from llm_engine.storage.base import Storage
from llm_engine.store.leased import Leased, Record
from llm_engine.store.sql import Store

logger = logging.getLogger("ray.serve")

MOST_NAMES = 1_000
#: A driver of several trainers does next to nothing itself.
DRIVER_CPUS = 0.1
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}


class Kept(Generic[Record]):
    """All records of one kind. Everything blocks."""

    MODULE: str  # `python -m MODULE RECORD` is its job
    SECTION: str  # of the settings
    NO_PROGRESS: str  # what jobs that die in a row did not come to

    def __init__(
        self,
        records: Leased[Record],
        limits: BatchSettings | FineTuneSettings,
        launcher: Launcher,
    ) -> None:
        self._records = records
        self._limits = limits
        self._launcher = launcher
        self._names: dict[str, str] = {}  # a record's last job
        self._running_since: dict[str, float] = {}  # a job's
        self._unclaimed: dict[str, tuple[int, int]] = {}  # a record's `starts`, jobs since then
        self._jobless: set[str] = set()  # of them Ray knew no job, and none has claimed them since
        self._started: dict[str, float] = {}  # unix seconds of a record's last start

    def look(self, gateways: list[str]) -> tuple[bool, bool]:
        """One look at all of them. Whether there are any that go on, and whether one of them is to
        be looked at again at once."""
        now = time.time()  # that of their leases: to ask Ray may take its time
        records = self._records.open()
        jobs = {record.id: self._see(record) for record in records}
        limits = self._limits
        deeds = decide(
            records,
            jobs,
            now,
            max_running=limits.max_running,
            max_idle_starts=limits.max_idle_starts,
            lease_s=limits.lease_s,
            unclaimed={record.id: self._unclaimed_jobs(record) for record in records},
            started=self._started,
        )
        for record in records:
            try:
                self._do(deeds[record.id], record, jobs[record.id], gateways)
            except LaunchError as error:
                logger.warning("the job of %s: %s", record.id, error)
                self._say(record, f"its job cannot be started now: {error}")
        self._jobless &= {record.id for record in records}
        for ended in self._names.keys() - {record.id for record in records}:
            name = self._names.pop(ended)
            self._running_since.pop(name, None)
            self._unclaimed.pop(ended, None)
            self._started.pop(ended, None)
            self._ended(ended, name)
        return any(map(self._goes_on, records)), Deed.RELEASE in deeds.values()

    # -- what kinds differ in

    def _resources(self) -> dict[str, float]:
        """That a job reserves."""
        raise NotImplementedError

    def _metadata(self, record: Record) -> dict[str, str]:
        raise NotImplementedError

    def _end(self, record: Record, deed: Deed, reason: str) -> None:
        """Without a job. `reason`: why, where that is a failure."""
        raise NotImplementedError

    def _last_words(self, record: Record, job: Seen | None) -> str:
        """How its last job ended."""
        return "" if job is None else job.message

    def _goes_on(self, record: Record) -> bool:
        return True

    def _ended(self, record: str, name: str) -> None:
        """It has, while its job was known here. One that runs finds out by itself."""
        try:
            job = self._launcher.find(name)
            if job is not None and job.live and not job.running:
                self._launcher.stop(name)  # it waits for CPUs, to do nothing
        except LaunchError as error:
            logger.warning("the job of %s: %s", record, error)

    # -- what they share

    def _do(self, deed: Deed, record: Record, job: Seen | None, gateways: list[str]) -> None:
        match deed:
            case Deed.START:
                self._start(record, gateways)
            case Deed.RELEASE:
                assert job is not None
                reason = f"its job ended: {job.message}"
                if self._records.release(record, reason):
                    logger.warning("%s: %s", record.id, reason)
            case Deed.STOP:
                logger.warning("%s: its job does nothing, ending it", record.id)
                self._launcher.stop(self._names[record.id])
            case Deed.END:
                self._end(record, deed, "")
            case Deed.REST:
                if record.reason is None or self._unclaimed_jobs(record):
                    how = self._last_words(record, job) or "Ray does not know why"
                    self._say(record, f"its jobs die, the next one starts later; the last: {how}")
            case Deed.CONCLUDE | Deed.GIVE_UP:
                self._give_up(record, job, deed)
            case Deed.NOTHING:
                self._explain(record, job)

    def _start(self, record: Record, gateways: list[str]) -> None:
        name = self._free_name(record)
        metadata = {"owner": record.owner, **self._metadata(record)}
        self._launcher.start(self.MODULE, record.id, name, gateways, metadata, **self._resources())
        self._names[record.id] = name
        self._unclaimed[record.id] = (record.starts, self._unclaimed_jobs(record) + 1)
        self._started[record.id] = time.time()
        logger.info("started %s", name)

    def _unclaimed_jobs(self, record: Record) -> int:
        starts, jobs = self._unclaimed.get(record.id, (0, 0))
        return jobs if starts == record.starts else 0

    def _free_name(self, record: Record) -> str:
        """The record's id; a job that takes over has a number behind it. Ray keeps the old ones."""
        for number in range(record.starts + 1, record.starts + MOST_NAMES):
            name = record.id if number == 1 else f"{record.id}-{number}"
            if name != self._names.get(record.id) and self._launcher.find(name) is None:
                return name
        raise LaunchError(f"Ray knows too many jobs of {record.id}")

    def _see(self, record: Record) -> Seen | None:
        name = self._names.get(record.id)
        if name is None:
            # Hundreds may wait their turn, and each look would ask Ray of all of them.
            if record.starts == 0 and record.id in self._jobless:
                return None
            name = self._last_name(record)
        job = self._launcher.find(name)
        if job is None:
            self._jobless.add(record.id)
            return None
        self._names[record.id] = name
        if not job.running:
            return Seen(job.live, False, job.message)
        since = self._running_since.setdefault(name, time.monotonic())
        return Seen(True, True, job.message, time.monotonic() - since)

    def _last_name(self, record: Record) -> str:
        """Of a job that an earlier keeper has started."""
        for number in range(record.starts + 2, 1, -1):
            name = f"{record.id}-{number}"
            if self._launcher.find(name) is not None:
                return name
        return record.id

    def _give_up(self, record: Record, job: Seen | None, deed: Deed) -> None:
        how = self._last_words(record, job) or "Ray does not know why"
        reason = (
            f"{record.idle_starts + self._unclaimed_jobs(record)} jobs in a row ended before "
            f"{self.NO_PROGRESS} ({self.SECTION}.max_idle_starts); the last one: {how}"
        )
        self._unclaimed.pop(record.id, None)
        self._end(record, deed, reason)
        logger.error("%s: %s", record.id, reason)

    def _explain(self, record: Record, job: Seen | None) -> None:
        """What a record waits for that nobody works on."""
        if record.worker is not None or not self._goes_on(record):
            return
        if job is None or not job.live:
            limit = self._limits.max_running
            self._say(
                record, f"it waits its turn: {limit} run at a time ({self.SECTION}.max_running)"
            )
        elif not job.running:
            wanted = " and ".join(
                f"{amount:g} {_RESOURCES[name]}" for name, amount in self._resources().items()
            )
            self._say(record, f"its job waits for a node with room for {wanted}")

    def _say(self, record: Record, reason: str) -> None:
        if record.reason != reason:
            self._records.say(record, reason)


class KeptBatches(Kept[BatchRecord]):
    MODULE = "jobs.batch"
    SECTION = "batches"
    NO_PROGRESS = "one more request was finished"

    def __init__(self, settings: Settings, store: Store, launcher: Launcher) -> None:
        super().__init__(store.batches, settings.batches, launcher)
        self._batches = store.batches

    def _resources(self) -> dict[str, float]:
        return {"num_cpus": self._limits.num_cpus}

    def _metadata(self, record: BatchRecord) -> dict[str, str]:
        return {"batch": record.id, "endpoint": record.endpoint}

    def _end(self, record: BatchRecord, deed: Deed, reason: str) -> None:
        error = {"code": "job_failed", "message": reason, "param": None, "line": None}
        if deed is Deed.CONCLUDE:
            self._batches.conclude(record, reason=reason, errors=[error])
        elif deed is Deed.GIVE_UP:
            if rows := record.completed + record.failed:
                folder, days = parts.folder_of(record.id), parts.GIVEN_UP_S // 86400
                reason += f". The operators have its {rows} finished rows for {days} days: {folder}"
                error["message"] = reason
            none = {"output_file_id": None, "error_file_id": None}  # they were not ready
            self._batches.end(record, BatchState.FAILED, reason=reason, errors=[error], **none)
        else:
            self._batches.end(record, BatchState.CANCELLED)


class KeptFineTunes(Kept[FineTuneRecord]):
    MODULE = "jobs.fine_tune"
    SECTION = "fine_tunes"
    NO_PROGRESS = "one more checkpoint was kept"

    def __init__(
        self, settings: Settings, store: Store, storage: Storage, launcher: Launcher
    ) -> None:
        super().__init__(store.fine_tunes, settings.fine_tunes, launcher)
        self._settings = settings.fine_tunes
        self._store = store
        self._storage = storage

    def _resources(self) -> dict[str, float]:
        limits = self._settings
        if limits.workers > 1:  # they reserve theirs themselves
            return {"num_cpus": DRIVER_CPUS}
        gpus = {"num_gpus": limits.num_gpus} if limits.num_gpus else {}
        return {"num_cpus": limits.num_cpus, **gpus}

    def _metadata(self, record: FineTuneRecord) -> dict[str, str]:
        return {"fine_tune": record.id, "base": record.base}

    def _end(self, record: FineTuneRecord, deed: Deed, reason: str) -> None:
        self._store.fine_tunes.end(record, {"code": "job_failed", "message": reason, "param": None})

    def _last_words(self, record: FineTuneRecord, job: Seen | None) -> str:
        claimed = not self._unclaimed_jobs(record)
        return (record.reason if claimed else None) or super()._last_words(record, job)

    def _goes_on(self, record: FineTuneRecord) -> bool:
        return record.state is not FineTuneState.PAUSED

    def _ended(self, record: str, name: str) -> None:
        """What it kept to go on from goes: its job may have been killed before it could do that."""
        super()._ended(record, name)
        try:
            adapters.sweep_fine_tune(self._store, self._storage, record)
        except StorageUnavailable as error:
            logger.warning("what %s has kept stays until the next sweep: %s", record, error)
