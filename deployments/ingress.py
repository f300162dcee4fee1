"""Ingress: HTTP in, HTTP out. A thin shell that keeps the gateway's picture of things fresh."""

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import replica
from llm_engine.api.app import Gateway, build_app
from llm_engine.config import Settings
from llm_engine.routing import Balancer
from llm_engine.services import Services

logger = logging.getLogger("ray.serve")

RETRY_S = 0.5
CALL_TIMEOUT_S = 30.0


@serve.deployment
@serve.ingress()
class Ingress:
    async def __init__(
        self, settings: Settings, router: DeploymentHandle, controller: DeploymentHandle
    ) -> None:
        replica.prepare()
        replica.check_exposure(settings)
        self._router = router
        self._name = serve.get_replica_context().replica_id.unique_id
        self._services = Services(
            settings=settings,
            balancer=Balancer(settings.gateway.retry_after_s),
            all_metrics=self._all_metrics,
            describe_replicas=self._describe_replicas,
            tell_request_id=False,
        )
        # The first picture is awaited: a gateway that is up knows its endpoints.
        self._services.balancer.update(await self._next_table())
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Gateway:
        return build_app(self._services)

    async def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("the ingress no longer follows the router")

    async def _follow(self) -> None:
        while True:
            try:
                self._services.balancer.update(await self._next_table())
            except Exception as error:
                # What was known stays good: engines serve on while the router restarts.
                logger.warning("the router does not answer, going on with what is known: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _next_table(self) -> Any:
        known = self._services.balancer.table.version
        samples = self._services.metrics.samples()
        call = self._router.watch.remote(known, self._name, samples)
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)

    async def _all_metrics(self) -> bytes | None:
        samples = self._services.metrics.samples()
        return await asyncio.wait_for(self._router.metrics.remote(self._name, samples), 5)

    async def _describe_replicas(self) -> list[dict[str, Any]]:
        return await asyncio.wait_for(self._router.describe.remote(), 5)
