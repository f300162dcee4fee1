"""Controller: makes the cluster's applications match the wanted endpoints; says how each one is.

The only writer of endpoint status. Serve calls here are blocking, so they run in threads.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections import defaultdict
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deployments import replica
from deployments.engine import build_endpoint, replica_resources
from llm_engine.config import EndpointSettings
from llm_engine.endpoints import Observed, derive, generation
from llm_engine.records import EndpointStatus, ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState

logger = logging.getLogger("ray.serve")

#: Between two looks at the cluster, each some 15 ms of CPU: while something is on its way, and
#: while all is as it should be.
BUSY_PERIOD_S = 0.5
QUIET_PERIOD_S = 3.0
#: An application found running waits this long for its replicas to say which version they are.
ADOPTION_S = 30.0
#: A failed start is tried again after this long, and after twice as long each time.
FIRST_RETRY_S, LONGEST_RETRY_S = 30.0, 600.0
Nodes = list[dict[str, float]]  # the resources of each node that is alive


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Controller:
    def __init__(self, router: DeploymentHandle) -> None:
        replica.prepare()
        self._router = router
        self._gateway = serve.get_replica_context().app_name
        self._wanted: dict[str, EndpointSettings] = {}
        self._told = asyncio.Event()  # what is wanted: before that, nothing may be deleted
        self._deployed: dict[str, str] = {}  # endpoint -> generation
        self._problems: dict[str, str] = {}  # endpoint -> why it could not be deployed
        self._retries: dict[str, Retry] = {}
        self._created: dict[str, int] = {}
        self._reports: dict[str, list[ReplicaReport]] = {}
        self._states: dict[str, EndpointState] = {}
        self._began = time.monotonic()
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_event_loop().create_task(self._run())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """A changed set of endpoints, without restarting anything but what changed."""
        endpoints = [EndpointSettings.model_validate(raw) for raw in user_config["endpoints"]]
        self._wanted = {endpoint.name: endpoint for endpoint in endpoints}
        self._told.set()
        self._hurry.set()

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the controller's loop ended")

    async def _run(self) -> None:
        await self._told.wait()
        while True:
            quiet = False
            self._hurry.clear()
            try:
                quiet = await self._reconcile()
            except Exception:
                logger.exception("reconciling failed; trying again")
            with contextlib.suppress(TimeoutError):
                period = QUIET_PERIOD_S if quiet else BUSY_PERIOD_S
                await asyncio.wait_for(self._hurry.wait(), period)

    async def _reconcile(self) -> bool:
        """One look at the cluster. True when every endpoint has what it wants."""
        status = await asyncio.to_thread(serve.status)
        applications = status.applications
        nodes = await asyncio.to_thread(alive_nodes)
        wanted = dict(self._wanted)
        for settings in wanted.values():
            await self._try_to_deploy(settings, applications, nodes)
        for application in applications.keys() - {self._application(name) for name in wanted}:
            if application.startswith(f"{self._gateway}."):
                await self._delete(application, applications[application])
        statuses = [self._status(s, applications, nodes) for s in wanted.values()]
        for each in statuses:
            self._log_change(each)
        reports = await asyncio.wait_for(self._router.set_endpoints.remote(statuses), 10)
        grouped: dict[str, list[ReplicaReport]] = defaultdict(list)
        for report in reports:
            grouped[report.endpoint].append(report)
        self._reports = grouped
        return all(
            status.state is EndpointState.READY and status.replicas_ready >= status.replicas_wanted
            for status in statuses
        )

    async def _try_to_deploy(
        self,
        settings: EndpointSettings,
        applications: dict[str, ApplicationStatusOverview],
        nodes: Nodes,
    ) -> None:
        """What is wrong with one endpoint must not keep the others from being looked after."""
        name = settings.name
        try:
            self._retry_if_due(name, applications.get(self._application(name)))
            await self._deploy_if_changed(settings, applications, nodes)
            self._problems.pop(name, None)
        except Exception as error:
            logger.exception("endpoint %s cannot be deployed", name)
            self._problems[name] = f"it cannot be deployed: {error}"

    def _retry_if_due(self, name: str, running: ApplicationStatusOverview | None) -> None:
        """Serve gives up after a few attempts; the cause (memory, a hub) may have passed since."""
        ready = any(r.state is ReplicaState.READY for r in self._reports.get(name, ()))
        failed = running is not None and running.status is ApplicationStatus.DEPLOY_FAILED
        if ready:
            self._retries.pop(name, None)
        if ready or not failed or self._deployed.get(name) != generation(self._wanted[name]):
            return
        retry = self._retries.setdefault(name, Retry())
        if retry.due():
            logger.info("endpoint %s failed to start; trying again", name)
            del self._deployed[name]

    async def _deploy_if_changed(
        self,
        settings: EndpointSettings,
        applications: dict[str, ApplicationStatusOverview],
        nodes: Nodes,
    ) -> None:
        name, wanted = settings.name, generation(settings)
        running = applications.get(self._application(name))
        if running is not None and name not in self._deployed and not self._adopt(name, running):
            return
        if running is not None and self._deployed.get(name) == wanted:
            return
        logger.info("deploying endpoint %s (generation %s)", name, wanted)
        target = build_endpoint(settings, wanted, self._gateway, total(nodes, "GPU") > 0)
        self._created.setdefault(name, int(time.time()))
        await asyncio.to_thread(
            serve.run_many,
            [serve.RunTarget(target=target, name=self._application(name), route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        self._deployed[name] = wanted

    def _adopt(self, name: str, running: ApplicationStatusOverview) -> bool:
        """Learn which version a running application has: this controller did not deploy it.

        False while that is not known yet; redeploying would restart its replicas for nothing.
        """
        self._created.setdefault(name, int(running.last_deployed_time_s))
        alive = (ReplicaState.STARTING, ReplicaState.READY)
        reports = [r for r in self._reports.get(name, ()) if r.state in alive]
        if reports:
            # In the middle of an update the newer version is the one that starts.
            starting = [r for r in reports if r.state is ReplicaState.STARTING]
            self._deployed[name] = (starting or reports)[-1].generation
            return True
        given_up = running.status is ApplicationStatus.DEPLOY_FAILED
        return given_up or time.monotonic() - self._began > ADOPTION_S

    async def _delete(self, application: str, running: ApplicationStatusOverview) -> None:
        if running.status is ApplicationStatus.DELETING:
            return
        logger.info("deleting %s", application)
        for name in [n for n in self._created if self._application(n) == application]:
            for known in (self._deployed, self._created, self._problems, self._retries):
                known.pop(name, None)
        await asyncio.to_thread(serve.delete, application, _blocking=False)

    def _status(
        self,
        settings: EndpointSettings,
        applications: dict[str, ApplicationStatusOverview],
        nodes: Nodes,
    ) -> EndpointStatus:
        running = applications.get(self._application(settings.name))
        deployment = running.deployments.get("EngineReplica") if running else None
        counts = deployment.replica_states if deployment else {}
        seen = Observed(
            reports=self._reports.get(settings.name, ()),
            deployed=running is not None,
            failed=running is not None and running.status is ApplicationStatus.DEPLOY_FAILED,
            problem=self._problems.get(settings.name),
            generation=generation(settings),
            message=(deployment.message if deployment else "")
            or (running.message if running else ""),
            lacking=lacking(settings, nodes),
            replicas_wanted=max(
                sum(n for state, n in counts.items() if state != "STOPPING"),
                settings.autoscaling.min_replicas,
            ),
        )
        created = self._created.setdefault(settings.name, int(time.time()))
        return derive(settings, seen, created)

    def _application(self, endpoint: str) -> str:
        return application_name(self._gateway, endpoint)

    def _log_change(self, status: EndpointStatus) -> None:
        if self._states.get(status.name) is not status.state:
            self._states[status.name] = status.state
            logger.info("endpoint %s is %s %s", status.name, status.state, status.reason or "")


class Retry:
    """When a failed start is tried again."""

    def __init__(self) -> None:
        self._wait = FIRST_RETRY_S
        self._at = time.monotonic() + self._wait

    def due(self) -> bool:
        """True once each time the wait is over; the next wait is twice as long."""
        if time.monotonic() < self._at:
            return False
        self._wait = min(2 * self._wait, LONGEST_RETRY_S)
        self._at = time.monotonic() + self._wait
        return True


def application_name(gateway: str, endpoint: str) -> str:
    """A Serve application's name: plain characters, no two endpoints share one, and it tells
    whose endpoint it is: two gateways on a cluster must leave each other's alone."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", endpoint)
    if plain != endpoint:
        plain += "-" + hashlib.sha256(endpoint.encode()).hexdigest()[:6]
    return f"{gateway}.{plain}"


def alive_nodes() -> Nodes:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: Nodes, kind: str) -> float:
    return sum(node.get(kind, 0) for node in nodes)


def lacking(settings: EndpointSettings, nodes: Nodes) -> str | None:
    """What one replica needs and cannot get, in words. A replica lives on one node."""
    gpus, cpus = replica_resources(settings, total(nodes, "GPU") > 0)
    short = []
    for kind, amount in (("GPU", gpus), ("CPU", cpus)):
        largest = max((node.get(kind, 0) for node in nodes), default=0)
        if amount > total(nodes, kind):
            short.append(f"needs {amount:g} {kind}s, the cluster has {total(nodes, kind):g}")
        elif amount > largest:
            short.append(f"needs {amount:g} {kind}s on one node, the largest has {largest:g}")
    return "; ".join(short) or None
