"""What the controller remembers of one endpoint between two looks at the cluster."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import ray
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deployments.engine import NAME, replica_resources
from llm_engine.config import EndpointSettings
from llm_engine.endpoints import Observed, generation
from llm_engine.records import EndpointRecord, ReplicaReport
from llm_engine.scaling import Demand, Scaler
from llm_engine.statuses import EndpointState, ReplicaState

#: A failed start is tried again after this long, and after twice as long each time.
FIRST_RETRY_S, LONGEST_RETRY_S = 30.0, 600.0
#: Nodes that are big enough but full: so long until that counts as a failure.
CROWDED_S = 60.0
#: What an ingress replica said it holds counts for so long; it says it again every second.
HELD_S = 3.0
#: Ids of records that are in no store, see the controller.
PROVISIONAL = "config:"
Nodes = list[dict[str, float]]  # the resources of each node that is alive
Reports = Sequence[ReplicaReport]


class Tended:
    def __init__(self, record: EndpointRecord, resources_timeout_s: float) -> None:
        self.take(record)
        self.reports: Reports = ()
        #: Replicas that a node runs. None: not known, so nobody may be taken for one that waits.
        self.placed: set[str] | None = None
        self.deployed_at: float | None = None  # unix seconds; None: not by this controller
        self.began_at: float | None = None  # a deployment, or a waking from no replicas
        self.problem: str | None = None  # why it could not be deployed
        self.applied: int | None = None  # replicas that the cluster was last asked for
        self.scaler = Scaler(self.settings.autoscaling.min_replicas)
        self.last_error: str | None = None
        self.unsaved = False  # the store does not know yet which version is deployed
        self._resources_timeout_s = resources_timeout_s
        self._failed: set[str] = set()  # replicas, since one was last ready
        self._tokens = 0
        self._active = False
        self._waiting_since: float | None = None
        self._held: dict[str, tuple[int, float]] = {}  # ingress -> requests, when
        self._retry: Retry | None = None

    def take(self, record: EndpointRecord) -> None:
        """The record as it is now. Another version begins with a clean slate."""
        settings = EndpointSettings.model_validate(record.spec)
        version = generation(settings)
        if version != getattr(self, "version", version):
            self._failed.clear()
            self._retry = None
            self.problem = None
            self._waiting_since = None
        self.record, self.settings, self.version = record, settings, version

    @property
    def provisional(self) -> bool:
        return self.record.id.startswith(PROVISIONAL)

    @property
    def left_alone(self) -> bool:
        """Whether an earlier controller deployed it, and the store, where other settings may stand
        than in the configuration, has not answered yet. It is still woken for those who wait."""
        adopted = self.provisional and self.deployed_at is None
        return adopted and not (self.applied == 0 and self._requests_held())

    @property
    def states(self) -> dict[str, ReplicaState]:
        """By replica."""
        return {report.replica: report.state for report in self.reports}

    def become(self, record: EndpointRecord) -> None:
        """The store has answered at last: what runs already need not start anew."""
        deployed = self.record.deployed  # by this controller: the store may know of one before
        self.take(replace(record, deployed=deployed or record.deployed))
        self.unsaved = deployed is not None and record.deployed != deployed

    def hear(self, reports: Reports, complete: bool) -> None:
        """What its replicas say of themselves; `complete`: each that runs has said a word."""
        self.reports = reports
        self.placed = {report.replica for report in reports} if complete else None
        tokens = sum(r.load.prompt_tokens + r.load.generated_tokens for r in reports)
        self._active = tokens != self._tokens
        self._tokens = tokens
        current = [r for r in reports if r.generation == self.version]
        if any(r.state is ReplicaState.READY for r in current):
            self._failed.clear()
        for report in current:
            if report.state is ReplicaState.FAILED and report.replica not in self._failed:
                self._failed.add(report.replica)
                self.last_error = report.reason

    def hold(self, ingress: str, requests: int) -> None:
        self._held[ingress] = (requests, time.monotonic())

    def replicas(self) -> int:
        """How many there should be from now on."""
        demand = Demand(
            depth=sum(r.load.depth for r in self.reports if r.state is ReplicaState.READY),
            held=self._requests_held(),
            active=self._active,
        )
        return self.scaler.decide(self.settings.autoscaling, demand, self._proving())

    def adopt(self, running: ApplicationStatusOverview) -> None:
        """An application that an earlier controller deployed: go on from what it has."""
        if self.applied is None:
            counts = replica_counts(running)
            self.applied = sum(n for state, n in counts.items() if state != "STOPPING")
            self.scaler = Scaler(self.applied)

    def observe(
        self, running: ApplicationStatusOverview | None, nodes: Nodes, usual_s: float | None
    ) -> Observed:
        deployed = running is not None and self.record.deployed == self.version
        deployment = running.deployments.get(NAME) if running else None
        lacking = starved = None
        if deployed and self._is_waiting():
            lacking = lacks(self.settings, nodes)
            starved = self._starved(lacking)
        return Observed(
            reports=self.reports,
            deployed=deployed,
            deployed_at=self.deployed_at,
            began_at=self.began_at,
            failed=deployed and has_failed(running),
            problem=self.problem,
            message=(deployment.message if deployment else "")
            or (running.message if running else ""),
            starved=starved,
            lacking=lacking,
            failures=len(self._failed),
            last_error=self.last_error,
            replicas_wanted=self.scaler.target,
            usual_s=usual_s,
        )

    def retry_is_due(self, running: ApplicationStatusOverview | None) -> bool:
        """Serve gives up after a few attempts; the cause (memory, a hub) may have passed since."""
        if any(r.state is ReplicaState.READY for r in self.reports):
            self._retry = None
            return False
        if not has_failed(running):
            return False
        self._retry = self._retry or Retry()
        return self._retry.due()

    def _requests_held(self) -> int:
        now = time.monotonic()
        self._held = {i: (n, at) for i, (n, at) in self._held.items() if now - at < HELD_S}
        return sum(n for n, _ in self._held.values())

    def _proving(self) -> bool:
        """Whether the wanted version has yet to answer, or to answer again: until then it does not
        sleep. A failure stays one, and an earlier version that serves goes on."""
        ready = self.record.settled and self.record.state is EndpointState.READY
        return not ready or self._starting()

    def _starting(self) -> bool:
        return any(r.state is ReplicaState.STARTING for r in self.reports)

    def _is_waiting(self) -> bool:
        """Whether no node runs a process of the wanted version yet."""
        placed = any(r.generation == self.version for r in self.reports)
        if placed or self._failed or self.scaler.target == 0:
            self._waiting_since = None
            return False
        self._waiting_since = self._waiting_since or time.monotonic()
        return True

    def _starved(self, lacking: str | None) -> str | None:
        assert self._waiting_since is not None
        waited = time.monotonic() - self._waiting_since
        if lacking is not None:
            return lacking if waited >= self._resources_timeout_s else None
        if waited < max(CROWDED_S, self._resources_timeout_s):
            return None
        return crowded(self.settings)


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
        plain += "-" + sha256(endpoint.encode()).hexdigest()[:6]
    return f"{gateway}.{plain}"


def has_failed(running: ApplicationStatusOverview | None) -> bool:
    return running is not None and running.status is ApplicationStatus.DEPLOY_FAILED


def replica_counts(running: ApplicationStatusOverview) -> dict[str, int]:
    deployment = running.deployments.get(NAME)
    return dict(deployment.replica_states) if deployment else {}


def alive_nodes() -> Nodes:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: Nodes, kind: str) -> float:
    return sum(node.get(kind, 0) for node in nodes)


def lacks(settings: EndpointSettings, nodes: Nodes) -> str | None:
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


def crowded(settings: EndpointSettings) -> str:
    """What one replica needs where every node that is big enough is full."""
    free = ray.available_resources()
    gpus, cpus = replica_resources(settings, "GPU" in ray.cluster_resources())
    kinds = {"GPU": gpus, "CPU": cpus}
    needs = " and ".join(f"{n:g} {kind}s" for kind, n in kinds.items() if n)
    spare = " and ".join(f"{free.get(kind, 0):g} {kind}s" for kind, n in kinds.items() if n)
    return (
        f"no node has room for a replica: it needs {needs}, and {spare} of all nodes together are "
        "free. Delete or scale down another endpoint, or add a node"
    )
