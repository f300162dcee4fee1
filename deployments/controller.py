"""Controller: makes the cluster's applications match the wanted endpoints; says how each one is.

What is wanted stands in the store: what clients have created there, and what the configuration
declares. The only writer of endpoint status, and of the directory of keys and models that the
ingress replicas have in memory. Calls of Serve and of the store are blocking, so they run in
threads.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deployments import replica
from deployments.engine import NAME, build_endpoint
from deployments.tended import (
    PROVISIONAL,
    Nodes,
    Tended,
    alive_nodes,
    application_name,
    total,
)
from llm_engine.config import EndpointSettings, Settings
from llm_engine.endpoints import OPERATOR, derive, signature
from llm_engine.engine.adapters import AdapterSource
from llm_engine.errors import ConfigError, LLMEngineError, StoreUnavailable
from llm_engine.records import EndpointRecord, EndpointStatus, ReplicaReport
from llm_engine.statuses import EndpointState
from llm_engine.store.sql import Store

logger = logging.getLogger("ray.serve")

#: Between two looks at the cluster, each some 15 ms of CPU: while something is on its way, and
#: while all is as it should be.
BUSY_PERIOD_S = 0.5
QUIET_PERIOD_S = 3.0
#: The store is read anew after so long, even where it says that nothing has changed.
REREAD_S = 15.0
Applications = dict[str, ApplicationStatusOverview]


@serve.deployment(num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class Controller:
    def __init__(self, settings: Settings, router: DeploymentHandle) -> None:
        replica.prepare()
        self._settings = settings
        self._router = router
        self._gateway = serve.get_replica_context().app_name
        self._store = Store(settings.store_url)
        self._identity: str | None = None  # of the store, once it has answered
        self._declared: list[EndpointSettings] = []
        self._undeclared = False  # the store does not know yet what is declared
        self._told = asyncio.Event()  # what is declared: before that, nothing may be deleted
        self._mark: tuple[object, ...] | None = None
        self._read_at: float | None = None  # the store; None: never, so what is wanted is a guess
        self._directory_mark: tuple[object, ...] | None = None
        self._told_at = 0.0
        self._telling = asyncio.Lock()
        self._usual: dict[str, list[float]] = {}
        self._tended: dict[str, Tended] = {}
        self._states: dict[str, EndpointState] = {}
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_event_loop().create_task(self._run())

    # -- what others tell it

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """A changed set of declared endpoints, without restarting anything but what changed."""
        self._declared = [EndpointSettings.model_validate(e) for e in user_config["endpoints"]]
        self._undeclared = True
        self._told.set()
        self._hurry.set()

    async def nudge(self) -> None:
        """The store has changed: look now. Returns once the router knows of keys and models."""
        self._mark = None
        self._hurry.set()
        with contextlib.suppress(StoreUnavailable):  # the next look will tell
            await self._tell_directory()

    async def hurry(self) -> None:
        """A replica is ready, or has failed: look now."""
        self._hurry.set()

    async def wake(self, endpoint: str, ingress: str, held: int) -> None:
        """An ingress replica holds so many requests for an endpoint without replicas."""
        tended = self._tended.get(endpoint)
        if tended is not None:
            tended.hold(ingress, held)
            if tended.scaler.target == 0:
                self._hurry.set()

    async def identity(self) -> str | None:
        """Of the store that this controller reads; None while it has not answered."""
        return self._identity

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the controller's loop ended")

    # -- its loop

    async def _run(self) -> None:
        await self._told.wait()
        while True:
            quiet = False
            self._hurry.clear()
            try:
                quiet = await self._look()
            except ConfigError as error:  # about the store
                logger.error("%s", error)
            except Exception:
                logger.exception("reconciling failed; trying again")
            with contextlib.suppress(TimeoutError):
                period = QUIET_PERIOD_S if quiet else BUSY_PERIOD_S
                await asyncio.wait_for(self._hurry.wait(), period)

    async def _look(self) -> bool:
        """One look at everything. True when every endpoint has what it wants."""
        await self._read_store()
        status = await asyncio.to_thread(serve.status)
        applications = status.applications
        nodes = await asyncio.to_thread(alive_nodes)
        for each in list(self._tended.values()):
            await self._tend(each, applications, nodes)
        await self._delete_others(applications)
        statuses = []
        tended = list(self._tended.values())
        for each in tended:
            told = self._status(each, applications, nodes)
            self._log_change(told)
            statuses.append(told)
        call = self._router.set_endpoints.remote(statuses, self._read_at is None)
        reports, complete, has_directory = await asyncio.wait_for(call, 10)
        if not has_directory:  # it has restarted since it was told
            self._directory_mark = None
            with contextlib.suppress(StoreUnavailable):
                await self._tell_directory()
        # Only now: what the store calls READY can be asked.
        for each, told in zip(tended, statuses, strict=True):
            await self._persist(each, told)
        self._hear(reports, complete)
        return all(
            each.record.settled
            and told.state is EndpointState.READY
            and told.replicas_ready >= told.replicas_wanted
            for each, told in zip(tended, statuses, strict=True)
        )

    # -- the store

    async def _read_store(self) -> None:
        """What is wanted; where the store is silent, what was known stays."""
        try:
            if self._identity is None:
                self._identity = await asyncio.to_thread(self._store.database.migrate)
            if self._undeclared:
                await self._declare()
            for tended in self._tended.values():
                await self._save_deployed(tended)
            mark = await asyncio.to_thread(self._store.mark)
            read_at = self._read_at
            if mark != self._mark or read_at is None or time.monotonic() - read_at > REREAD_S:
                self._take(await asyncio.to_thread(self._store.endpoints.all))
                self._read_at = time.monotonic()
                self._usual = await asyncio.to_thread(self._store.endpoints.starts)
                self._mark = mark
            await self._tell_directory()
        except StoreUnavailable as error:
            logger.warning("%s", error)
            if self._read_at is None:
                self._take([self._provisional(settings) for settings in self._declared])

    async def _tell_directory(self) -> None:
        async with self._telling:  # an older one must not be told after a newer one
            mark = await asyncio.to_thread(self._store.directory_mark)
            if mark != self._directory_mark or time.monotonic() - self._told_at > REREAD_S:
                directory = await asyncio.to_thread(self._store.directory)
                await asyncio.wait_for(self._router.set_directory.remote(directory), 10)
                self._directory_mark, self._told_at = mark, time.monotonic()

    async def _save_deployed(self, tended: Tended) -> None:
        """Which version the cluster has; kept in memory until the store has it."""
        if tended.unsaved:
            deployed = tended.record.deployed
            assert deployed is not None
            changed = await asyncio.to_thread(
                self._store.endpoints.note_deployed, tended.record.id, deployed
            )
            if changed is None or changed.revision != tended.record.revision + 1:
                self._mark = None  # somebody has asked for something else: read that first
            else:
                tended.record = changed
            tended.unsaved = False

    async def _declare(self) -> None:
        taken = await asyncio.to_thread(self._store.endpoints.declare, self._declared)
        for name in taken:
            logger.warning(
                "the configuration declares an endpoint '%s', but a client has made one of that "
                "name; it stays. Delete it, and the declared one takes its place",
                name,
            )
        self._undeclared = False
        self._mark = None

    def _provisional(self, settings: EndpointSettings) -> EndpointRecord:
        """A declared endpoint while the store has never answered: served, and written nowhere."""
        spec = settings.model_dump(mode="json")
        known = self._tended.get(settings.name)
        if known is not None:
            return replace(known.record, spec=spec)  # it tells what is deployed, too
        now = time.time()
        return EndpointRecord(
            id=f"{PROVISIONAL}{settings.name}",
            name=settings.name,
            owner=OPERATOR,
            origin="config",
            spec=spec,
            state=EndpointState.UPDATE_PENDING,
            created_at=now,
            requested_at=now,
            updated_at=now,
        )

    def _take(self, records: list[EndpointRecord]) -> None:
        for record in records:
            known = self._tended.get(record.name)
            if known is not None and known.record.id == record.id:
                known.take(record)
            elif known is not None and known.provisional:
                known.become(record)
            else:
                limit = self._settings.gateway.resources_timeout_s
                self._tended[record.name] = Tended(record, limit)
        for name in self._tended.keys() - {record.name for record in records}:
            del self._tended[name]

    # -- the cluster

    async def _tend(self, tended: Tended, applications: Applications, nodes: Nodes) -> None:
        """What is wrong with one endpoint must not keep the others from being looked after."""
        application = application_name(self._gateway, tended.record.name)
        running = applications.get(application)
        try:
            if tended.record.state is EndpointState.DELETE_IN_PROGRESS:
                await self._delete(tended, application, running)
                return
            if running is not None:
                tended.adopt(running)
                if tended.left_alone:
                    return
            wanted = tended.replicas()
            if self._must_deploy(tended, running):
                await self._deploy(tended, application, nodes, max(1, wanted))
            elif running is not None and running.status is not ApplicationStatus.DELETING:
                if tended.applied != wanted:
                    logger.info("scaling %s from %s to %s", application, tended.applied, wanted)
                    await replica.scale(application, NAME, wanted)
                    if tended.applied == 0:
                        tended.began_at = time.time()
                    tended.applied = wanted
            tended.problem = None
        except StoreUnavailable as error:
            logger.warning("%s", error)
        except Exception as error:
            logger.exception("endpoint %s cannot be deployed", tended.record.name)
            tended.problem = f"it cannot be deployed: {error}"

    def _must_deploy(self, tended: Tended, running: ApplicationStatusOverview | None) -> bool:
        if running is None:
            return True
        if self._read_at is None or running.status is ApplicationStatus.DELETING:
            return False  # which version it has is in the store
        return tended.record.deployed != tended.version or tended.retry_is_due(running)

    async def _deploy(self, tended: Tended, application: str, nodes: Nodes, replicas: int) -> None:
        logger.info("deploying %s (generation %s)", application, tended.version)
        superseded = await asyncio.to_thread(replica.unplaced, application, tended.placed)
        target = build_endpoint(
            tended.settings,
            tended.version,
            self._gateway,
            total(nodes, "GPU") > 0,
            replicas,
            AdapterSource.of(self._settings),
        )
        tended.deployed_at = tended.began_at = time.time()
        tended.applied = replicas
        await asyncio.to_thread(
            serve.run_many,
            [
                serve.RunTarget(
                    target=target,
                    name=application,
                    route_prefix=None,
                    external_scaler_enabled=True,
                )
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        await asyncio.to_thread(replica.kill, superseded)
        # Only now: were we killed in between, the next controller would deploy it again.
        tended.record = replace(tended.record, deployed=tended.version)
        tended.unsaved = True
        if self._read_at is not None:
            await self._save_deployed(tended)

    async def _delete(
        self, tended: Tended, application: str, running: ApplicationStatusOverview | None
    ) -> None:
        if running is None:
            await asyncio.to_thread(self._store.endpoints.remove, tended.record)
            self._tended.pop(tended.record.name, None)
            self._undeclared = True  # the configuration may have waited for the name
        elif running.status is not ApplicationStatus.DELETING:
            logger.info("deleting %s", application)
            await asyncio.to_thread(serve.delete, application, _blocking=False)
        else:
            await asyncio.to_thread(_kill_unplaced, application, tended.placed)

    async def _delete_others(self, applications: Applications) -> None:
        """Applications of this gateway that no record asks for."""
        if self._read_at is None or self._mark is None:
            return
        wanted = {application_name(self._gateway, name) for name in self._tended}
        for application in applications.keys() - wanted:
            deleting = applications[application].status is ApplicationStatus.DELETING
            if application.startswith(f"{self._gateway}.") and not deleting:
                logger.info("deleting %s, which nobody wants", application)
                await asyncio.to_thread(serve.delete, application, _blocking=False)

    # -- status

    def _hear(self, reports: list[ReplicaReport], complete: bool) -> None:
        grouped: dict[str, list[ReplicaReport]] = defaultdict(list)
        for report in reports:
            grouped[report.endpoint].append(report)
        for name, tended in self._tended.items():
            before = tended.states
            tended.hear(grouped.get(name, ()), complete)
            if tended.states != before:
                self._hurry.set()  # its status is another one now

    def _status(self, tended: Tended, applications: Applications, nodes: Nodes) -> EndpointStatus:
        running = applications.get(application_name(self._gateway, tended.record.name))
        usual = self._usual.get(signature(tended.settings))
        seen = tended.observe(running, nodes, median(usual) if usual else None)
        return derive(tended.record, tended.settings, seen, time.time())

    async def _persist(self, tended: Tended, status: EndpointStatus) -> None:
        """Write what has changed; where the store is silent, the next look tries again."""
        record = tended.record
        ended = status.state in (EndpointState.READY, EndpointState.UPDATE_FAILED)
        settled = record.settled or ended
        phases = None if status.phases.queued is None else asdict(status.phases)
        if self._read_at is None or (
            status.state is record.state
            and status.reason == record.reason
            and settled == record.settled
            and (record.settled or not settled or phases == record.phases)
        ):
            return
        try:
            changed = await asyncio.to_thread(
                self._store.endpoints.observe, record, status.state, status.reason, settled, phases
            )
            if changed is None:  # somebody asked for something else: read that first
                self._mark = None
                self._hurry.set()
                return
            # What is deployed may not be in the store yet.
            tended.record = replace(changed, deployed=record.deployed)
            spent = status.phases.total
            first = settled and not record.settled and status.state is EndpointState.READY
            if first and spent is not None:
                assert status.phases.queued is not None  # the total is of all four
                await asyncio.to_thread(
                    self._store.endpoints.add_start,
                    signature(tended.settings),
                    spent - status.phases.queued,
                )
                self._usual = await asyncio.to_thread(self._store.endpoints.starts)
        except LLMEngineError as error:
            logger.warning("%s", error)

    def _log_change(self, status: EndpointStatus) -> None:
        if self._states.get(status.name) is not status.state:
            self._states[status.name] = status.state
            logger.info("endpoint %s is %s %s", status.name, status.state, status.reason or "")


def _kill_unplaced(application: str, placed: set[str] | None) -> None:
    replica.kill(replica.unplaced(application, placed))
