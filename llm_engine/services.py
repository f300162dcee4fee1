"""What every route receives: the settings, the picture of who serves what, the way to engines."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpcore

from llm_engine.catalog import Catalog, Route
from llm_engine.config import Settings
from llm_engine.errors import NotFound, StoreUnavailable
from llm_engine.metrics import IngressMetrics
from llm_engine.records import Directory, Principal, RoutingTable
from llm_engine.relay import Pool
from llm_engine.routing import Balancer
from llm_engine.safe import Safe
from llm_engine.signing import Signer
from llm_engine.storage.base import Storage
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store

SILENCE_S = 5.0


async def _own_metrics_only() -> bytes | None:
    return None


async def _no_replicas() -> list[dict]:
    return []


async def _nobody_to_tell(*_: object) -> None:
    return None


@dataclass
class Services:
    settings: Settings
    balancer: Balancer
    store: Store
    catalog: Catalog = field(init=False)
    safe: Safe = field(init=False)
    storage: Storage = field(init=False)
    pool: Pool = field(default_factory=Pool)
    #: Connections to external models, once one has been called.
    upstream_pool: httpcore.AsyncConnectionPool | None = None
    metrics: IngressMetrics = field(default_factory=IngressMetrics)
    #: Whether answers must carry x-request-id themselves; Ray Serve adds it where it is around.
    tell_request_id: bool = True
    #: The merged metrics of all ingress replicas, or None where there is only this one.
    all_metrics: Callable[[], Awaitable[bytes | None]] = _own_metrics_only
    #: Every replica's own report, as plain data without secrets; for operators.
    describe_replicas: Callable[[], Awaitable[list[dict]]] = _no_replicas
    #: Says that so many requests are held for an endpoint that sleeps.
    wake: Callable[[str, int], Awaitable[None]] = _nobody_to_tell
    #: Says that the store has changed.
    nudge: Callable[[], Awaitable[None]] = _nobody_to_tell
    #: Says that there is a new batch or fine-tune, or one that shall not go on.
    nudge_jobs: Callable[[], Awaitable[None]] = _nobody_to_tell
    #: Training files are looked through one at a time.
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _signer: Signer | None = None
    #: One look at a time into the store for an unknown name, however many ask; none for a while
    #: after it was silent.
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _silent_until: float = 0.0
    _telling: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.balancer)
        self.safe = Safe(self.settings)
        self.storage = open_storage(self.settings)

    async def signer(self) -> Signer:
        """Raises StoreUnavailable where its secret has not been read yet, and cannot be."""
        if self._signer is None:
            self._signer = Signer(await asyncio.to_thread(self.store.database.secret))
        return self._signer

    async def route(self, who: Principal, name: str, task: str | None = None) -> Route:
        """Where a name leads, also that of an adapter which has become one a moment ago. Raises
        as `catalog.resolve`."""
        try:
            return self.catalog.resolve(who, name, task)
        except NotFound:
            if not await self.look_up(name):
                raise
        return self.catalog.resolve(who, name, task)

    async def look_up(self, name: str) -> bool:
        """Whether the store has an adapter of that name that was not known here. While it is
        silent, what is known here is all there is."""
        if name in self.catalog.directory.adapters:
            return False
        async with self._looking:
            if name in self.catalog.directory.adapters:
                return True  # somebody else has just asked
            if time.monotonic() < self._silent_until:
                return False
            try:
                found = await asyncio.to_thread(self.store.adapters.get, name)
            except NotFound:
                return False
            except StoreUnavailable:
                self._silent_until = time.monotonic() + SILENCE_S
                return False
            self.catalog.learn(found)
        telling = asyncio.create_task(self._tell())  # the other gateways, too
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        return True

    async def _tell(self) -> None:
        await self.nudge()

    def update(self, table: RoutingTable | None, directory: Directory | None) -> None:
        """The newest picture; None: as before."""
        if table is not None:
            self.balancer.update(table)
        if directory is not None:
            self.catalog.update(directory)
