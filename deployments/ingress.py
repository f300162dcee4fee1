"""Ingress: HTTP in, HTTP out. A thin shell that keeps the gateway's picture of things fresh."""

import asyncio
import contextlib
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import replica
from llm_engine.api.app import Gateway, build_app
from llm_engine.config import ENV_STORE, Settings
from llm_engine.errors import ConfigError, Unavailable
from llm_engine.records import Directory, RoutingTable
from llm_engine.routing import Balancer
from llm_engine.services import Services
from llm_engine.store.sql import Store

logger = logging.getLogger("ray.serve")

RETRY_S = 0.5
CALL_TIMEOUT_S = 30.0
FIRST_TABLE_TRIES = 10
#: Of the time that a replica may take to drain; then Serve kills it.
GIVEN_BACK_IN = 0.8
Picture = tuple[RoutingTable, Directory | None]


@serve.deployment
@serve.ingress()
class Ingress:
    async def __init__(
        self,
        settings: Settings,
        router: DeploymentHandle,
        controller: DeploymentHandle,
        keeper: DeploymentHandle,
    ) -> None:
        replica.prepare()
        replica.check_exposure(settings)
        self._router = router
        self._controller = controller
        self._keeper = keeper
        self._name = serve.get_replica_context().replica_id.unique_id
        self._services = Services(
            settings=settings,
            balancer=Balancer(settings.gateway.retry_after_s),
            store=Store(settings.store_url),
            wake=self._wake,
            nudge=self._nudge,
            nudge_jobs=self._nudge_keeper,
            all_metrics=self._all_metrics,
            describe_replicas=self._describe_replicas,
            tell_request_id=False,
        )
        await self._check_store()
        # The first picture is awaited: a gateway that is up knows its endpoints.
        self._services.update(*await self._first_table())
        self._following = asyncio.create_task(self._follow())
        self._gateway = build_app(self._services)
        drain_s = settings.gateway.drain_timeout_s
        replica.when_stopping(lambda: self._gateway.retire(GIVEN_BACK_IN * drain_s))

    def __serve_build_asgi_app__(self) -> Gateway:
        return self._gateway

    async def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("the ingress no longer follows the router")

    async def _check_store(self) -> None:
        """Refuse to work on a store that only this node has, or that is a newer llm-engine's."""
        store = self._services.store
        try:
            await asyncio.to_thread(store.database.is_current)
            others = await asyncio.wait_for(self._controller.identity.remote(), CALL_TIMEOUT_S)
            ours = await asyncio.to_thread(store.database.identity)
        except ConfigError:
            raise
        except Exception as error:  # whoever is silent now can't be compared
            logger.warning("cannot compare this node's store with the controller's: %s", error)
            return
        if others is not None and ours != others:
            raise RuntimeError(
                f"this node's store {store.database.shown} is not the controller's. A gateway on "
                f"several nodes needs PostgreSQL: set {ENV_STORE} on every node."
            )

    async def _follow(self) -> None:
        while True:
            try:
                self._services.update(*await self._next_table())
            except Exception as error:
                # What was known stays good: engines serve on while the router restarts.
                logger.warning("the router does not answer, going on with what is known: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _first_table(self) -> Picture:
        for _ in range(FIRST_TABLE_TRIES):
            try:
                return await self._next_table()
            except Exception as error:
                logger.warning("the router has no picture yet: %s", error)
                await asyncio.sleep(RETRY_S)
        return await self._next_table()

    async def _next_table(self) -> Picture:
        known = self._services.balancer.table.version
        directory = self._services.catalog.directory.version
        samples = self._services.metrics.samples()
        call = self._router.watch.remote(known, directory, self._name, samples)
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)

    async def _all_metrics(self) -> bytes | None:
        return await self._ask_router("metrics", self._name, self._services.metrics.samples())

    async def _describe_replicas(self) -> list[dict[str, Any]]:
        try:
            return await self._ask_router("describe")
        except Unavailable:  # then those that this replica knows to be ready
            known = self._services.balancer.table.replicas.values()
            return [report.plain() for group in known for report in group]

    async def _wake(self, endpoint: str, held: int) -> None:
        await self._tell_controller("wake", endpoint, self._name, held)

    async def _nudge(self) -> None:
        """It looks by itself every few seconds; this is for those who can't wait."""
        with contextlib.suppress(Unavailable):
            await self._tell_controller("nudge")

    async def _nudge_keeper(self) -> None:
        """As above."""
        try:
            await asyncio.wait_for(self._keeper.nudge.remote(), 5)
        except Exception as error:
            logger.warning("the keeper does not answer a nudge: %s", error)

    async def _tell_controller(self, method: str, *args: Any) -> None:
        try:
            await asyncio.wait_for(getattr(self._controller, method).remote(*args), 5)
        except Exception as error:
            logger.warning("the controller does not answer a %s: %s", method, error)
            raise Unavailable("The controller is restarting.") from None

    async def _ask_router(self, method: str, *args: Any) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._router, method).remote(*args), 5)
        except Exception as error:
            logger.warning("the router does not answer a %s: %s", method, error)
            raise Unavailable(
                "The router is restarting, so this cannot be told now. Models answer meanwhile.",
                code="router_restarting",
                retry_after=self._services.settings.gateway.retry_after_s,
            ) from None
