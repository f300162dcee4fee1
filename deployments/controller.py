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
from deployments.engine import build_endpoint, replica_gpus
from llm_engine.config import EndpointSettings
from llm_engine.endpoints import Observed, derive, generation
from llm_engine.records import EndpointStatus, ReplicaReport
from llm_engine.statuses import EndpointState

logger = logging.getLogger("ray.serve")

PREFIX = "endpoint-"
#: Between two looks at the cluster, each some 15 ms of CPU: while something is on its way, and
#: while all is as it should be.
BUSY_PERIOD_S = 0.5
QUIET_PERIOD_S = 2.0
#: An application found running waits this long for its replicas to say which version they are.
ADOPTION_S = 30.0
GIVEN_UP = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Controller:
    def __init__(self, router: DeploymentHandle) -> None:
        replica.prepare()
        self._router = router
        self._gateway = serve.get_replica_context().app_name
        self._wanted: dict[str, EndpointSettings] = {}
        self._told = asyncio.Event()  # what is wanted: before that, nothing may be deleted
        self._deployed: dict[str, str] = {}  # endpoint -> generation
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
        resources = await asyncio.to_thread(ray.cluster_resources)
        wanted = dict(self._wanted)
        for settings in wanted.values():
            await self._deploy_if_changed(settings, applications, resources)
        for application in applications.keys() - {application_name(n) for n in wanted}:
            if application.startswith(PREFIX):
                await self._delete(application, applications[application])
        statuses = [self._status(s, applications, resources) for s in wanted.values()]
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

    async def _deploy_if_changed(
        self,
        settings: EndpointSettings,
        applications: dict[str, ApplicationStatusOverview],
        resources: dict[str, float],
    ) -> None:
        name, wanted = settings.name, generation(settings)
        running = applications.get(application_name(name))
        if running is not None and name not in self._deployed and not self._adopt(name, running):
            return
        if running is not None and self._deployed.get(name) == wanted:
            return
        logger.info("deploying endpoint %s (generation %s)", name, wanted)
        target = build_endpoint(settings, wanted, self._gateway, resources.get("GPU", 0) > 0)
        self._deployed[name] = wanted
        self._created.setdefault(name, int(time.time()))
        await asyncio.to_thread(
            serve.run_many,
            [serve.RunTarget(target=target, name=application_name(name), route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def _adopt(self, name: str, running: ApplicationStatusOverview) -> bool:
        """Learn which version a running application has: this controller did not deploy it.

        False while that is not known yet; redeploying would restart its replicas for nothing.
        """
        self._created.setdefault(name, int(running.last_deployed_time_s))
        reports = self._reports.get(name, [])
        if reports:
            self._deployed[name] = reports[-1].generation
            return True
        given_up = running.status in GIVEN_UP
        return given_up or time.monotonic() - self._began > ADOPTION_S

    async def _delete(self, application: str, running: ApplicationStatusOverview) -> None:
        if running.status is ApplicationStatus.DELETING:
            return
        logger.info("deleting %s", application)
        for name in [n for n in self._deployed if application_name(n) == application]:
            del self._deployed[name]
            self._created.pop(name, None)
        await asyncio.to_thread(serve.delete, application, _blocking=False)

    def _status(
        self,
        settings: EndpointSettings,
        applications: dict[str, ApplicationStatusOverview],
        resources: dict[str, float],
    ) -> EndpointStatus:
        running = applications.get(application_name(settings.name))
        deployment = running.deployments.get("EngineReplica") if running else None
        counts = deployment.replica_states if deployment else {}
        seen = Observed(
            reports=self._reports.get(settings.name, ()),
            deployed=running is not None,
            failed=running is not None and running.status in GIVEN_UP,
            message=(deployment.message if deployment else "")
            or (running.message if running else ""),
            lacking=lacking(settings, resources),
            replicas_wanted=max(sum(counts.values()), settings.autoscaling.min_replicas),
        )
        created = self._created.setdefault(settings.name, int(time.time()))
        return derive(settings, seen, created)

    def _log_change(self, status: EndpointStatus) -> None:
        if self._states.get(status.name) is not status.state:
            self._states[status.name] = status.state
            logger.info("endpoint %s is %s %s", status.name, status.state, status.reason or "")


def application_name(endpoint: str) -> str:
    """A Serve application's name: plain characters, and no two endpoints share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", endpoint)
    if plain != endpoint:
        plain += "-" + hashlib.sha256(endpoint.encode()).hexdigest()[:6]
    return PREFIX + plain


def lacking(settings: EndpointSettings, resources: dict[str, float]) -> str | None:
    """What one replica needs and the whole cluster has not, in words."""
    gpus = replica_gpus(settings, resources.get("GPU", 0) > 0)
    needs = {"GPU": gpus, "CPU": settings.num_cpus}
    short = [
        f"needs {amount:g} {kind}s, the cluster has {resources.get(kind, 0):g}"
        for kind, amount in needs.items()
        if amount > resources.get(kind, 0)
    ]
    return "; ".join(short) or None
