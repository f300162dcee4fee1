"""ModelRouter: the live picture of who serves what, pushed to every ingress replica.

Engine replicas report to it, the controller tells it the endpoints' states, ingress replicas hold
a call open that returns with the next picture. Never on the path of a request. All it knows comes
back within seconds from those who told it, so it stores nothing.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import serve

from deployments import replica
from llm_engine import metrics
from llm_engine.metrics import EngineTotals, Merger, Samples
from llm_engine.records import Directory, EndpointStatus, Load, ReplicaReport, RoutingTable
from llm_engine.statuses import ReplicaState

REPORT_INTERVAL_S = 0.5
#: Reports that all replicas together may send in a second; with more replicas each sends fewer.
REPORTS_PER_S = 50
WATCH_S = 10.0
#: Loads change with every request; the picture is redrawn for them at most this often.
LOAD_REFRESH_S = 0.25
#: A router that has just started gives every replica this long to report before it tells anyone.
HEARING_S = 1.5
#: And this long, and one of their intervals, before a replica that is silent counts as none at all:
#: a call to the router before may have to fail first.
ROLL_CALL_S = 15.0
#: Silent for so many of its intervals, a replica is taken for dead.
MISSED_REPORTS = 6
#: Replicas that were forgotten and might come back; older ones are only a sum.
MOST_GONE = 1000


@serve.deployment(num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class ModelRouter:
    def __init__(self) -> None:
        replica.prepare()
        self._began_at = time.monotonic()
        self._reports: dict[str, ReplicaReport] = {}
        self._heard: dict[str, float] = {}
        self._endpoints: dict[str, EndpointStatus] = {}
        self._stored: dict[str, EndpointStatus] = {}  # as last told by one who has read the store
        self._endpoints_at: float | None = None  # when the controller was first heard
        self._table = RoutingTable(version=time.time_ns())  # ahead of any earlier router's
        self._directory = Directory()
        self._adapters: set[str] = set()  # the ids of those in the directory
        self._changed = asyncio.Event()
        self._informed = asyncio.Event()  # both the controller and the replicas have been heard
        self._dirty = False
        self._merger = Merger()
        self._ingresses: dict[str, float] = {}
        self._gone: dict[str, ReplicaReport] = {}
        self._past_tokens: dict[str, Load] = defaultdict(Load)
        self._housekeeping: asyncio.Task[None] | None = None

    async def report(self, report: ReplicaReport) -> float:
        """A replica describes itself. Returns how many seconds it may wait before the next."""
        self._start_housekeeping()
        before = self._reports.get(report.replica)
        self._reports[report.replica] = report
        self._heard[report.replica] = time.monotonic()
        self._gone.pop(report.replica, None)
        if before is None or replace(before, load=report.load) != report:
            self._redraw()
        elif before.load != report.load:
            self._dirty = True
        return self._interval()

    async def forget(self, replica: str) -> None:
        """A replica says that it has stopped. Why it failed is kept until the controller had
        time to read it: like one that falls silent."""
        report = self._reports.get(replica)
        if report is not None and report.state is not ReplicaState.FAILED:
            self._forget(replica)
            self._redraw()

    async def set_endpoints(
        self, endpoints: list[EndpointStatus], partial: bool = False
    ) -> tuple[list[ReplicaReport], bool, bool]:
        """The controller's word on each endpoint. Returns what is known of the replicas, whether
        these are all that run, and whether a directory is known: a router that has just started
        has heard of few replicas, and of no directory.

        `partial`: from a controller that has not read the store yet, and knows only what is
        declared. What was told of the store before stays good.
        """
        self._start_housekeeping()
        if self._endpoints_at is None:
            self._endpoints_at = time.monotonic()
        fresh = {endpoint.name: endpoint for endpoint in endpoints}
        if partial:
            fresh |= self._stored
        else:
            self._stored = fresh
        if fresh != self._endpoints:
            self._endpoints = fresh
            self._redraw()
        complete = time.monotonic() - self._began_at > ROLL_CALL_S + self._interval()
        return list(self._reports.values()), complete, self._directory.version != 0

    async def set_directory(self, directory: Directory) -> None:
        """The controller's word on keys, registered models and adapters."""
        self._directory = directory
        self._adapters = {adapter.id for adapter in directory.adapters.values()}
        self._announce()

    async def deleted(self, adapters: Sequence[str]) -> list[str]:
        """Of these that a replica has in memory, those that nobody can ask for any more."""
        if self._directory.version == 0:
            return []  # nobody has told yet
        return [adapter for adapter in adapters if adapter not in self._adapters]

    async def watch(
        self, known: int, known_directory: int, ingress: str, samples: Samples
    ) -> tuple[RoutingTable, Directory | None]:
        """The next picture after version `known`, or the same one after WATCH_S; the directory
        only where it is another than `known_directory`.

        Takes along what the ingress replica has counted. Raises TimeoutError while this router
        knows too little: an empty picture would make an ingress forget its good one.
        """
        self._start_housekeeping()
        self._merger.put(ingress, samples)
        self._ingresses[ingress] = time.monotonic()
        await asyncio.wait_for(self._informed.wait(), WATCH_S)
        if (self._table.version, self._directory.version) == (known, known_directory):
            try:
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
            except TimeoutError:
                pass
        # Version 0 is no directory at all: this router has just started.
        fresh = self._directory.version not in (0, known_directory)
        return self._table, self._directory if fresh else None

    async def metrics(self, ingress: str, samples: Samples) -> bytes:
        """The Prometheus text of the whole system."""
        self._merger.put(ingress, samples)
        self._ingresses[ingress] = time.monotonic()
        return metrics.render(self._merger.total(), self._endpoints.values(), self._engine_totals())

    async def describe(self) -> list[dict[str, Any]]:
        """Every replica's report, for operators."""
        return [report.plain() for report in self._reports.values()]

    def _redraw(self) -> None:
        ready: dict[str, list[ReplicaReport]] = defaultdict(list)
        for report in self._reports.values():
            if report.state is ReplicaState.READY:
                ready[report.endpoint].append(report)
        self._dirty = False
        self._table = RoutingTable(
            version=self._table.version + 1,
            endpoints=self._endpoints,
            replicas={name: tuple(reports) for name, reports in ready.items()},
        )
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _interval(self) -> float:
        return max(REPORT_INTERVAL_S, len(self._reports) / REPORTS_PER_S)

    def _start_housekeeping(self) -> None:
        if self._housekeeping is None:
            self._housekeeping = asyncio.create_task(self._keep_house())

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(LOAD_REFRESH_S)
            now = time.monotonic()
            if self._endpoints_at is not None and now - self._endpoints_at > HEARING_S:
                self._informed.set()
            limit = MISSED_REPORTS * self._interval()
            silent = [name for name, at in self._heard.items() if now - at > limit]
            for name in silent:
                self._forget(name)
            for name in [n for n, at in self._ingresses.items() if now - at > 3 * WATCH_S]:
                del self._ingresses[name]
                self._merger.retire(name)
            if silent or self._dirty:
                self._redraw()

    def _forget(self, replica: str) -> None:
        """A replica that was only silent for a while must not be counted twice when it is back."""
        report = self._reports.pop(replica, None)
        self._heard.pop(replica, None)
        if report is not None:
            self._gone[replica] = report
            while len(self._gone) > MOST_GONE:
                oldest = next(iter(self._gone))
                lost = self._gone.pop(oldest)
                past = self._past_tokens[lost.endpoint]
                self._past_tokens[lost.endpoint] = _add_counters(past, lost.load)

    def _engine_totals(self) -> dict[str, EngineTotals]:
        totals = {}
        for name in self._endpoints:
            load = self._past_tokens[name]
            # Whatever has become of a replica, its tokens stay counted: a counter never goes back.
            for report in (*self._gone.values(), *self._reports.values()):
                if report.endpoint == name:
                    load = _add_counters(load, report.load)
            live = [
                r
                for r in self._reports.values()
                if r.endpoint == name and r.state is not ReplicaState.FAILED
            ]
            load = replace(
                load,
                running=sum(r.load.running for r in live),
                waiting=sum(r.load.waiting for r in live),
                kv_cache_usage=sum(r.load.kv_cache_usage for r in live) / (len(live) or 1),
            )
            taking = sum(r.state is ReplicaState.READY for r in live)
            totals[name] = EngineTotals(load, taking)
        return totals


def _add_counters(a: Load, b: Load) -> Load:
    return replace(
        a,
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        generated_tokens=a.generated_tokens + b.generated_tokens,
    )
