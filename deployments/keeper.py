"""JobKeeper: sees to it that every batch and every fine-tune that has not ended has a job, and just
one; and cleans up what nobody needs any more.

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
from deployments.kept import KeptBatches, KeptFineTunes
from jobs.launcher import Launcher
from llm_engine import files
from llm_engine.batches import parts
from llm_engine.config import Settings
from llm_engine.errors import APIError, LLMEngineError, StorageUnavailable
from llm_engine.fine_tunes import adapters
from llm_engine.statuses import EndpointState
from llm_engine.storage import ownership
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store

logger = logging.getLogger("ray.serve")

#: Between two looks: when a job is to be started anew, while there are records, while there are
#: none. New ones are told.
HURRIED_S, BUSY_S, QUIET_S = 0.1, 1.0, 15.0
#: Of a look at the jobs: Ray's client waits for an answer for ever.
LOOK_LIMIT_S = 900.0
#: Between two rounds of cleaning up.
SWEEP_S = 60.0
#: Of as many rows as one transaction forgets; the next sweep goes on.
SWEEP_ROUNDS = 100
ORPHANS_SWEEP_S = 6 * 3600.0  # it lists every batch's folder, every fine-tune's and every adapter's


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class JobKeeper:
    def __init__(self, settings: Settings) -> None:
        replica.prepare()
        self._settings = settings
        self._store = Store(settings.store_url)
        self._storage = open_storage(settings)
        launcher = Launcher(ray.get_runtime_context().gcs_address, settings)
        self._kept = (
            KeptBatches(settings, self._store, launcher),
            KeptFineTunes(settings, self._store, self._storage, launcher),
        )
        self._swept_at = time.monotonic()
        self._orphans_swept_at = -math.inf
        self._looked_at = time.monotonic()
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_event_loop().create_task(self._run())

    async def nudge(self) -> None:
        """There is a new record, or one that shall not go on: look now."""
        self._hurry.set()

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the keeper's loop ended")
        if time.monotonic() - self._looked_at > LOOK_LIMIT_S:
            raise RuntimeError("a look at the jobs does not end: Ray hangs")

    async def _run(self) -> None:
        while True:
            period = BUSY_S
            self._hurry.clear()
            try:
                self._looked_at = time.monotonic()
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
            self._looked_at = math.inf  # it may take its time; the storage has limits of its own
            try:
                self._sweep()
            except StorageUnavailable as error:  # jobs are looked after all the same
                logger.warning("cleaning up: %s", error)
            self._looked_at = time.monotonic()
        gateways = self._gateways()
        period = QUIET_S
        for kept in self._kept:
            any_open, at_once = kept.look(gateways)
            period = min(period, HURRIED_S if at_once else BUSY_S if any_open else QUIET_S)
        return period

    def _sweep(self) -> None:
        """What has expired or was deleted, and what outlived the record that it was for."""
        forget_expired(self._store, time.time())  # first: it needs no storage
        gone = files.sweep(self._storage, self._store, time.time())
        if gone:
            logger.info("%s expired files and uploads are gone", gone)
        adapters.sweep(self._store, self._storage)
        if time.monotonic() - self._orphans_swept_at > ORPHANS_SWEEP_S:
            self._sweep_orphans()
            self._orphans_swept_at = time.monotonic()
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

    def _sweep_orphans(self) -> None:
        """What no record asks for. Records of another store ask for what is theirs."""
        owner = ownership.claim(self._storage, self._store.database.identity())
        if owner is not None:
            logger.error(
                "the storage %s is another store's (%s), so nothing in it is cleaned up here: give "
                "each store a bucket, a prefix or a folder of its own (storage.url)",
                *(self._storage.shown, owner),
            )
            return
        parts.sweep(self._store, self._storage)
        adapters.sweep_orphans(self._store, self._storage)
        files.sweep_orphans(self._storage, self._store, time.time())

    def _gateways(self) -> list[str]:
        """Where a job may find a gateway, the nearest first."""
        gateway = self._settings.gateway
        hosts = ["127.0.0.1"]
        if not gateway.is_loopback:
            nodes: list[dict[str, Any]] = ray.nodes()
            others = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
            hosts = list(dict.fromkeys([*hosts, *others]))
        return [f"http://{host}:{gateway.port}" for host in hosts]


def forget_expired(store: Store, now: float) -> int:
    """Responses and stored chats whose time is over; how many."""
    gone = 0
    for kind in (store.responses, store.chats):
        for _ in range(SWEEP_ROUNDS):
            swept = kind.sweep(now)
            gone += swept
            if not swept:
                break
    if gone:
        logger.info("%s expired responses and stored chats are gone", gone)
    return gone
