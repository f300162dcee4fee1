"""EngineReplica: one engine process, its health, its load, and a drain that loses no request.

Serve owns its placement, its number and its restarts. Requests reach the engine's private port
directly from the ingress; nothing of them passes through this actor.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import replica
from llm_engine.config import EndpointSettings
from llm_engine.engine.adapters import AdapterSource
from llm_engine.engine.process import EngineProcess
from llm_engine.errors import EngineError
from llm_engine.records import ReplicaReport
from llm_engine.statuses import ReplicaState

logger = logging.getLogger("ray.serve")

#: The one deployment of an endpoint's application.
NAME = "EngineReplica"
#: After its last report says DRAINING, ingress replicas may still send for as long as this.
FAREWELL_S = 1.0
#: Probes of an engine's load that may fail in a row before it is taken for hung.
MOST_MISSED = 10
#: Between two questions which adapters in the engine's memory have been deleted.
FORGET_S = 2.0
#: Serve kills a replica that drains longer than its endpoint allows by so much.
SHUTDOWN_MARGIN_S = 20


@serve.deployment
class EngineReplica:
    async def __init__(
        self,
        settings: EndpointSettings,
        generation: str,
        gateway: str,
        adapters: AdapterSource | None = None,
    ) -> None:
        replica.prepare()
        self._settings = settings
        self._router: DeploymentHandle = serve.get_deployment_handle("ModelRouter", gateway)
        self._controller: DeploymentHandle = serve.get_deployment_handle("Controller", gateway)
        self._engine = EngineProcess(settings, ray.util.get_node_ip_address(), adapters)
        self._report = ReplicaReport(
            endpoint=settings.name,
            replica=serve.get_replica_context().replica_id.unique_id,
            generation=generation,
            state=ReplicaState.STARTING,
            began_at=time.time(),
            weights=settings.model,
            max_adapters=settings.adapter_slots,
        )
        self._missed = 0
        self._asked_at = 0.0  # what has been deleted of the adapters in memory
        self._reporting = asyncio.create_task(self._keep_reporting())
        try:
            address = await self._engine.start()
        except Exception as error:
            known = isinstance(error, EngineError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            await self._tell(state=ReplicaState.FAILED, reason=reason)
            await self._call(self._controller, "hurry")
            self._reporting.cancel()
            # Without `from None` Serve would show a user two tracebacks before the cause.
            raise RuntimeError(reason) from None
        await self._tell(
            state=ReplicaState.READY,
            loaded_at=self._engine.loaded_at,
            ready_at=time.time(),
            host=address.host,
            port=address.port,
            secret=address.secret,
            max_model_len=address.max_model_len,
        )
        await self._call(self._controller, "hurry")  # whoever waits for READY hears it at once

    async def check_health(self) -> None:
        """Serve calls it every second and replaces a replica that raises."""
        if self._report.state is ReplicaState.FAILED:
            raise RuntimeError(self._report.reason)
        if self._reporting.done():
            raise RuntimeError("it no longer reports to the router")
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Serve's graceful shutdown: finish what is running, then end the engine."""
        if self._report.state is ReplicaState.READY:
            await self._drain()
        self._reporting.cancel()
        await self._engine.stop()
        await self._call_router("forget", self._report.replica)

    async def _drain(self) -> None:
        await self._tell(state=ReplicaState.DRAINING)
        await asyncio.sleep(FAREWELL_S)
        end = time.monotonic() + self._settings.drain_timeout_s
        idle = missed = 0
        while time.monotonic() < end:
            try:
                idle = idle + 1 if (await self._engine.load()).depth == 0 else 0
                missed = 0
            except Exception as error:  # as in `_observe`: it may be a busy moment
                idle, missed = 0, missed + 1
                logger.warning("probe %s of a drain failed: %s", missed, error)
                if not self._engine.alive or missed >= MOST_MISSED:
                    return
            if idle == 3:  # the last answer's bytes have left the engine's HTTP server, too
                return
            await asyncio.sleep(0.2)
        logger.warning("drain_timeout_s is over; the requests still running are cut")

    async def _keep_reporting(self) -> None:
        interval = 0.5
        while True:
            if self._report.state in (ReplicaState.READY, ReplicaState.DRAINING):
                await self._observe()
            elif self._report.loaded_at != self._engine.loaded_at:
                self._report = replace(self._report, loaded_at=self._engine.loaded_at)
            interval = await self._call_router("report", self._report) or interval
            await self._forget_adapters()
            await asyncio.sleep(interval)

    async def _forget_adapters(self) -> None:
        """Those that have been deleted: nobody can ask for them any more."""
        loaded = self._report.load.adapters
        if not loaded or time.monotonic() - self._asked_at < FORGET_S:
            return
        self._asked_at = time.monotonic()
        gone = await self._call_router("deleted", loaded)
        if gone:
            logger.info("adapters that have been deleted: %s", ", ".join(gone))
            with contextlib.suppress(EngineError):  # it is asked again
                await self._engine.forget(gone)

    async def _observe(self) -> None:
        """One probe that fails may be a busy moment; a dead process, or many in a row, is not."""
        try:
            load = await self._engine.load()
            self._report = replace(self._report, load=load)  # as it is now, not as it was before
            self._missed = 0
        except Exception as error:
            self._missed += 1
            logger.warning("probe %s of %s failed: %s", self._missed, self._settings.name, error)
            gone = not self._engine.alive or self._missed >= MOST_MISSED
            if gone and self._report.state is ReplicaState.READY:
                logger.error("the engine of %s failed: %s", self._settings.name, error)
                self._report = replace(self._report, state=ReplicaState.FAILED, reason=str(error))

    async def _tell(self, **change: Any) -> None:
        self._report = replace(self._report, **change)
        await self._call_router("report", self._report)

    async def _call_router(self, method: str, *args: Any) -> Any:
        """It may be restarting; the next report will tell it all again."""
        return await self._call(self._router, method, *args)

    async def _call(self, whom: DeploymentHandle, method: str, *args: Any) -> Any:
        try:
            return await asyncio.wait_for(getattr(whom, method).remote(*args), 5)
        except Exception as error:
            logger.warning("a %s was not taken: %s", method, error)
            return None


def build_endpoint(
    settings: EndpointSettings,
    generation: str,
    gateway: str,
    cluster_has_gpus: bool,
    replicas: int,
    adapters: AdapterSource | None = None,
) -> serve.Application:
    """The Serve application of one endpoint. The controller changes the number of replicas."""
    gpus, cpus = replica_resources(settings, cluster_has_gpus)
    options: dict[str, Any] = {
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "health_check_period_s": 1,
        "health_check_timeout_s": 30,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + SHUTDOWN_MARGIN_S,
        "max_constructor_retry_count": 2,
        "max_surge_percent": settings.max_surge_percent,
    }
    if settings.tensor_parallel_size > 1:
        # All ranks of an engine in one bundle: on one node, taken together or not at all.
        bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        options["placement_group_bundles"] = [bundle]
        options["placement_group_strategy"] = "STRICT_PACK"
    return EngineReplica.options(**options).bind(settings, generation, gateway, adapters)


def replica_resources(settings: EndpointSettings, cluster_has_gpus: bool) -> tuple[float, float]:
    """GPUs and CPUs of one replica. Without GPUs every rank of its engine works on CPUs."""
    ranks = settings.tensor_parallel_size
    gpus = settings.num_gpus
    if gpus is None:
        gpus = ranks if settings.engine == "vllm" and cluster_has_gpus else 0
    return gpus, settings.num_cpus * (1 if gpus else ranks)
