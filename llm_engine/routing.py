"""Which replica takes a request: a decision in process, in microseconds, from the last picture.

Pure: knows neither Ray nor HTTP. Every ingress replica has a Balancer of its own; the router
pushes them the same RoutingTable.
"""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from zlib import crc32

from llm_engine.background import Online
from llm_engine.errors import NotFound, Overloaded, Unavailable
from llm_engine.records import EndpointStatus, ReplicaReport, RoutingTable
from llm_engine.statuses import EndpointState

#: How long a replica that just failed a request is left alone. Longer than the router needs to
#: hear of its death, short enough for a mere hiccup.
SUSPECT_S = 3.0
#: A request goes to a replica that has its adapter in memory, unless others have less to do by this
#: share of what autoscaling aims at.
DETOUR = 0.5


class Balancer:
    """Power of two choices (Mitzenmacher 2001) on requests in flight.

    A replica's cost is what this ingress has in flight there, plus what others had at the last
    report: its reported queue depth less our own share at that time.
    """

    def __init__(self, retry_after_s: int = 5, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = RoutingTable()
        self.changed = asyncio.Event()  # set, and another one put in its place, at every update
        self._retry_after_s = retry_after_s
        self._clock = clock
        #: By endpoint: requests from here that are no batch's.
        self.online: defaultdict[str, Online] = defaultdict(Online)
        self._in_flight: Counter[str] = Counter()
        self._others: dict[str, int] = {}
        self._suspects: dict[str, float] = {}  # replica -> trusted again at

    def update(self, table: RoutingTable) -> None:
        self.table = table
        replicas = [replica for group in table.replicas.values() for replica in group]
        self._others = {
            r.replica: max(0, r.load.depth - self._in_flight[r.replica]) for r in replicas
        }
        known = self._others.keys()
        for gone in [name for name in self._in_flight if name not in known]:
            if not self._in_flight[gone]:
                del self._in_flight[gone]
        now = self._clock()
        self._suspects = {n: t for n, t in self._suspects.items() if n in known and t > now}
        for gone in self.online.keys() - table.endpoints.keys():
            if not self.online[gone].recent:
                del self.online[gone]
        self.changed.set()
        self.changed = asyncio.Event()

    def endpoint(self, name: str) -> EndpointStatus:
        """Raises NotFound once it is gone."""
        endpoint = self.table.endpoints.get(name)
        if endpoint is None:
            raise NotFound(
                f"The model '{name}' does not exist.", param="model", code="model_not_found"
            )
        return endpoint

    def choose(
        self,
        endpoint: EndpointStatus,
        exclude: Collection[str] = (),
        adapter: str | None = None,
        session: str | None = None,
    ) -> ReplicaReport:
        """The replica to ask, with `adapter` one that can load it, with `session` the one that had
        its earlier requests, if it may be. Raises Unavailable (none is ready) or Overloaded (all
        are full)."""
        ready = [r for r in self.table.replicas.get(endpoint.name, ()) if r.replica not in exclude]
        if adapter is not None:
            # In an update some run another version still.
            ready = [r for r in ready if r.max_adapters > 0 and r.weights == endpoint.model]
        if not ready:
            raise self._unavailable(endpoint, retried=bool(exclude))
        trusted = [r for r in ready if r.replica not in self._suspects] if self._suspects else ready
        pool = trusted or ready
        picked = pool if len(pool) <= 2 else random.sample(pool, 2)
        best = min(picked, key=self.cost) if len(picked) > 1 else picked[0]
        if len(pool) > 1 and (home := self._home(pool, adapter, session)) is not None:
            detour = DETOUR * endpoint.target_queue_depth
            best = home if self.cost(home) <= self.cost(best) + detour else best
        # What is in flight from here is exact; what others have there is a guess by now, and the
        # engine itself refuses what is over its limit.
        if self._in_flight[best.replica] >= endpoint.max_queue:
            best = min(pool, key=self.cost)
            if self._in_flight[best.replica] >= endpoint.max_queue:
                raise self.overloaded(endpoint)
        return best

    def _home(
        self, pool: Sequence[ReplicaReport], adapter: str | None, session: str | None
    ) -> ReplicaReport | None:
        """Who has the adapter in memory, or what the session's requests begin with; before anybody
        has, the one that every ingress picks (rendezvous hashing, Thaler and Ravishankar 1996)."""
        holders = [r for r in pool if adapter in r.load.adapters] if adapter is not None else []
        name = session or adapter
        if name is None:
            return None
        if holders and session is None:
            return min(holders, key=self.cost)
        return max(holders or pool, key=lambda r: crc32(f"{name} {r.replica}".encode()))

    def cost(self, replica: ReplicaReport) -> int:
        return self._in_flight[replica.replica] + self._others.get(replica.replica, 0)

    def acquire(self, replica: ReplicaReport) -> None:
        self._in_flight[replica.replica] += 1

    def release(self, replica: ReplicaReport) -> None:
        self._in_flight[replica.replica] -= 1

    def suspect(self, replica: ReplicaReport) -> None:
        self._suspects[replica.replica] = self._clock() + SUSPECT_S

    def overloaded(self, endpoint: EndpointStatus) -> Overloaded:
        return Overloaded(
            f"The queue of '{endpoint.name}' is full: each replica holds at most "
            f"{endpoint.max_queue} requests (max_queue). Retry later.",
            param="model",
            retry_after=self._retry_after_s,
        )

    def _unavailable(self, endpoint: EndpointStatus, retried: bool) -> Unavailable:
        if retried:
            why = "the replicas that were asked failed before they answered"
        elif endpoint.state is EndpointState.UPDATE_FAILED:
            why = endpoint.reason or "its replicas cannot start"
        elif endpoint.state is EndpointState.READY:
            why = "its replicas are being replaced"
        else:
            why = endpoint.reason or "its first replica is starting"
        return Unavailable(
            f"The model '{endpoint.name}' cannot answer now: {why}.".replace("..", "."),
            param="model",
            retry_after=self._retry_after_s,
        )
