"""JobKeeper: sees to it that every batch that has not ended has a job, and just one.

It keeps nothing to itself: what is wanted stands in the store, what runs Ray knows. Killed at any
moment, the next one goes on from there.
"""

import asyncio
import contextlib
import logging
import math
import time
from typing import Any

import ray
from ray import serve

from deployments import replica
from jobs.launcher import Launcher, LaunchError
from llm_engine import files
from llm_engine.batches import parts
from llm_engine.config import Settings
from llm_engine.errors import APIError, LLMEngineError, StorageUnavailable
from llm_engine.keeping import Deed, Seen, decide
from llm_engine.records import BatchRecord
from llm_engine.statuses import BatchState, EndpointState
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store

logger = logging.getLogger("ray.serve")

#: Between two looks: when a job is to be started anew, while there are batches, while there are
#: none. New ones are told.
HURRIED_S, BUSY_S, QUIET_S = 0.1, 1.0, 15.0
#: Between two rounds of cleaning up.
SWEEP_S = 60.0
PARTS_SWEEP_S = 6 * 3600.0  # it lists every batch's folder
MOST_NAMES = 1_000


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class JobKeeper:
    def __init__(self, settings: Settings) -> None:
        replica.prepare()
        self._settings = settings
        self._limits = settings.batches
        self._store = Store(settings.store_url)
        self._storage = open_storage(settings)
        self._launcher = Launcher(ray.get_runtime_context().gcs_address, settings)
        self._names: dict[str, str] = {}  # a batch's last job
        self._running_since: dict[str, float] = {}  # a job's
        self._unclaimed: dict[str, tuple[int, int]] = {}  # a batch's `starts`, jobs since then
        self._swept_at = time.monotonic()
        self._parts_swept_at = -math.inf
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_event_loop().create_task(self._run())

    async def nudge(self) -> None:
        """There is a new batch, or one to cancel: look now."""
        self._hurry.set()

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the keeper's loop ended")

    async def _run(self) -> None:
        while True:
            period = BUSY_S
            self._hurry.clear()
            try:
                period = await asyncio.to_thread(self._look)
            except LLMEngineError as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("looking after the jobs failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), period)

    def _look(self) -> float:
        """One look at everything. Returns how many seconds there are until the next."""
        if time.monotonic() - self._swept_at > SWEEP_S:
            self._swept_at = time.monotonic()
            try:
                self._sweep()
            except StorageUnavailable as error:  # batches are looked after all the same
                logger.warning("cleaning up: %s", error)
        batches = self._store.batches.open()
        jobs = {batch.id: self._see(batch) for batch in batches}
        limits = self._limits
        deeds = decide(
            batches,
            jobs,
            time.time(),
            max_running=limits.max_running,
            max_idle_starts=limits.max_idle_starts,
            lease_s=limits.lease_s,
            unclaimed={batch.id: self._unclaimed_jobs(batch) for batch in batches},
        )
        for batch in batches:
            try:
                self._do(deeds[batch.id], batch, jobs[batch.id])
            except LaunchError as error:
                logger.warning("the job of %s: %s", batch.id, error)
                self._say(batch, f"its job cannot be started now: {error}")
        ours = {batch.id for batch in batches}
        for ended in self._names.keys() - ours:
            self._running_since.pop(self._names.pop(ended), None)
            self._unclaimed.pop(ended, None)
        if Deed.RELEASE in deeds.values():
            return HURRIED_S
        return BUSY_S if batches else QUIET_S

    def _do(self, deed: Deed, batch: BatchRecord, job: Seen | None) -> None:
        match deed:
            case Deed.START:
                self._start(batch)
            case Deed.RELEASE:
                assert job is not None
                reason = f"its job ended: {job.message}"
                if self._store.batches.release(batch, reason):
                    logger.warning("%s: %s", batch.id, reason)
            case Deed.STOP:
                logger.warning("%s: its job does nothing, ending it", batch.id)
                self._launcher.stop(self._names[batch.id])
            case Deed.END:
                cancelled = batch.state is BatchState.CANCELLING
                to = BatchState.CANCELLED if cancelled else BatchState.EXPIRED
                self._store.batches.end(batch, to)
            case Deed.CONCLUDE | Deed.GIVE_UP:
                self._give_up(batch, job, deed)
            case Deed.NOTHING:
                self._explain(batch, job)

    def _start(self, batch: BatchRecord) -> None:
        name = self._free_name(batch)
        metadata = {"batch": batch.id, "owner": batch.owner, "endpoint": batch.endpoint}
        self._launcher.start(
            "jobs.batch", batch.id, name, self._gateways(), self._limits.num_cpus, metadata
        )
        self._names[batch.id] = name
        self._unclaimed[batch.id] = (batch.starts, self._unclaimed_jobs(batch) + 1)
        logger.info("started %s", name)

    def _unclaimed_jobs(self, batch: BatchRecord) -> int:
        starts, jobs = self._unclaimed.get(batch.id, (0, 0))
        return jobs if starts == batch.starts else 0

    def _free_name(self, batch: BatchRecord) -> str:
        """The batch's id; a job that takes over has a number behind it. Ray keeps the old ones."""
        for number in range(batch.starts + 1, batch.starts + MOST_NAMES):
            name = batch.id if number == 1 else f"{batch.id}-{number}"
            if name != self._names.get(batch.id) and self._launcher.find(name) is None:
                return name
        raise LaunchError(f"Ray knows too many jobs of {batch.id}")

    def _see(self, batch: BatchRecord) -> Seen | None:
        name = self._names.get(batch.id) or self._last_name(batch)
        job = self._launcher.find(name) if name is not None else None
        if name is None or job is None:
            return None
        self._names[batch.id] = name
        if not job.running:
            return Seen(job.live, False, job.message)
        since = self._running_since.setdefault(name, time.monotonic())
        return Seen(True, True, job.message, time.monotonic() - since)

    def _last_name(self, batch: BatchRecord) -> str | None:
        """Of a job that an earlier keeper has started."""
        for number in range(batch.starts + 2, 1, -1):
            name = f"{batch.id}-{number}"
            if self._launcher.find(name) is not None:
                return name
        return batch.id

    def _give_up(self, batch: BatchRecord, job: Seen | None, deed: Deed) -> None:
        how = job.message if job is not None and job.message else "Ray does not know why"
        reason = (
            f"{batch.idle_starts + self._unclaimed_jobs(batch)} jobs in a row ended before one "
            f"more request was finished (batches.max_idle_starts); the last one: {how}"
        )
        error = {"code": "job_failed", "message": reason, "param": None, "line": None}
        self._unclaimed.pop(batch.id, None)
        if deed is Deed.CONCLUDE:
            self._store.batches.conclude(batch, reason=reason, errors=[error])
        else:
            self._store.batches.end(batch, BatchState.FAILED, reason=reason, errors=[error])
        logger.error("%s: %s", batch.id, reason)

    def _explain(self, batch: BatchRecord, job: Seen | None) -> None:
        """What a batch waits for that nobody works on."""
        if batch.worker is not None:
            return
        if job is None or not job.live:
            limit = self._limits.max_running
            self._say(batch, f"it waits its turn: {limit} run at a time (batches.max_running)")
        elif not job.running:
            self._say(batch, "its job waits for a node with free CPUs (batches.num_cpus)")

    def _say(self, batch: BatchRecord, reason: str) -> None:
        if batch.reason != reason:
            self._store.batches.say(batch, reason)

    def _sweep(self) -> None:
        """What has expired, and parts and engines that outlived the batch that they were for."""
        gone = files.sweep(self._storage, self._store, time.time())
        if gone:
            logger.info("%s expired files and uploads are gone", gone)
        if time.monotonic() - self._parts_swept_at > PARTS_SWEEP_S:
            parts.sweep(self._store, self._storage)
            self._parts_swept_at = time.monotonic()
        for endpoint in self._store.endpoints.all():
            leaving = endpoint.state is EndpointState.DELETE_IN_PROGRESS
            if endpoint.origin != "batch" or leaving:
                continue
            try:
                ended = self._store.batches.get(endpoint.name).state.is_final
            except APIError:
                ended = True
            if ended:
                self._store.endpoints.ask_delete(endpoint.name)

    def _gateways(self) -> list[str]:
        """Where a job may find a gateway, the nearest first."""
        gateway = self._settings.gateway
        hosts = ["127.0.0.1"]
        if not gateway.is_loopback:
            nodes: list[dict[str, Any]] = ray.nodes()
            others = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
            hosts = list(dict.fromkeys([*hosts, *others]))
        return [f"http://{host}:{gateway.port}" for host in hosts]
