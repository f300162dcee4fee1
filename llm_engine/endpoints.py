"""What state an endpoint is in, from what was observed. Pure, and the only place to decide it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from llm_engine.config import EndpointSettings
from llm_engine.records import EndpointRecord, EndpointStatus, Phases, ReplicaReport
from llm_engine.statuses import EndpointState, ReplicaState

#: Who owns what the configuration declares, and whatever is made without a key.
OPERATOR = "llm-engine"
#: What changes of an endpoint without another engine.
_LIGHT = ("autoscaling", "fallback", "public")


def generation(settings: EndpointSettings) -> str:
    """A short name for exactly this engine; another one means a rolling update."""
    return _digest(settings.model_dump(mode="json", exclude=set(_LIGHT)))


def declaration(settings: EndpointSettings) -> str:
    """A short name for exactly these settings: whether the configuration's entry has changed."""
    return _digest(settings.model_dump(mode="json"))


def signature(settings: EndpointSettings) -> str:
    """What starts in about the same time: whatever it is called."""
    told = settings.model_dump(mode="json", include={"model", "engine", "vllm_args", "num_gpus"})
    return _digest(told)


def _digest(data: object) -> str:
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the cluster says of one endpoint."""

    reports: Sequence[ReplicaReport] = ()
    deployed: bool = False  # the cluster has the version that is wanted
    deployed_at: float | None = None  # unix seconds
    began_at: float | None = None  # the start under way: a deployment's, or a wake's
    failed: bool = False  # the cluster has given up starting it
    message: str = ""  # the cluster's own words
    problem: str | None = None  # why it could not even be handed to the cluster
    starved: str | None = None  # what it has waited for in vain: "needs 4 GPUs, the cluster has 2"
    lacking: str | None = None  # the same, while there is still hope
    failures: int = 0  # replicas that failed since one was last ready
    last_error: str | None = None
    replicas_wanted: int = 0
    usual_s: float | None = None  # how long such a start takes


#: So many replicas that fail one after the other are a failure, whatever the cluster hopes for.
MOST_FAILURES = 3


def derive(
    record: EndpointRecord, settings: EndpointSettings, seen: Observed, now: float
) -> EndpointStatus:
    """READY means that a replica of the wanted version has answered; a failure has its cause."""
    wanted = generation(settings)
    ready = [r for r in seen.reports if r.state is ReplicaState.READY]
    current = [r for r in ready if r.generation == wanted]
    state, reason = _judge(record, seen, ready, current)
    lengths = [r.max_model_len for r in ready if r.max_model_len]
    starting = state in (EndpointState.UPDATE_PENDING, EndpointState.UPDATE_IN_PROGRESS)
    phases = Phases(**record.phases) if record.phases else Phases()
    if not record.settled:
        phases = measure(record, seen, [r for r in seen.reports if r.generation == wanted])
    return EndpointStatus(
        name=settings.name,
        model=settings.model,
        task=settings.task,
        state=state,
        reason=reason,
        replicas_wanted=seen.replicas_wanted,
        replicas_ready=len(ready),
        created=int(record.created_at),
        max_queue=settings.max_queue,
        max_model_len=min(lengths, default=0),
        owned_by=record.owner,
        public=settings.public,
        fallback=settings.fallback,
        sleeps=settings.autoscaling.min_replicas == 0,
        wake_timeout_s=settings.autoscaling.wake_timeout_s,
        target_queue_depth=settings.autoscaling.target_queue_depth,
        max_replicas=settings.autoscaling.max_replicas,
        priorities=settings.priorities,
        generation=wanted,
        phases=phases,
        eta_s=_remaining(seen, now) if starting else None,
        last_error=seen.last_error,
        max_adapters=settings.adapter_slots,
        max_adapter_rank=settings.max_adapter_rank,
    )


def measure(record: EndpointRecord, seen: Observed, reports: Sequence[ReplicaReport]) -> Phases:
    """The phases of a start, from the replica that has come furthest."""
    handed = seen.deployed_at
    if handed is None:
        return Phases()
    handed = max(handed, record.requested_at)
    queued = handed - record.requested_at
    # A replica that failed is no longer on its way, and one from before is not part of this.
    alive = [r for r in reports if r.state is not ReplicaState.FAILED and r.began_at >= handed - 1]
    if not alive:
        return Phases(queued=queued)
    best = min(alive, key=lambda r: (r.ready_at or _NEVER, r.loaded_at or _NEVER, r.began_at))
    return Phases(
        queued=queued,
        scheduling=max(0.0, best.began_at - handed),
        loading=best.loaded_at - best.began_at if best.loaded_at else None,
        warming=best.ready_at - best.loaded_at if best.ready_at else None,
    )


_NEVER = float("inf")


def _remaining(seen: Observed, now: float) -> float | None:
    if seen.usual_s is None:
        return None
    return max(0.0, seen.usual_s - (now - (seen.began_at or now)))


def shown_state(
    record: EndpointRecord, status: EndpointStatus | None
) -> tuple[EndpointState, str | None]:
    """State and reason as of now: the controller's word, unless the record has moved on since."""
    ended = (EndpointState.READY, EndpointState.UPDATE_FAILED)
    settings = EndpointSettings.model_validate(record.spec)
    outdated = status is not None and (
        status.generation != generation(settings)
        or (not record.settled and status.state in ended)
        or record.state is EndpointState.DELETE_IN_PROGRESS
    )
    if status is None or outdated:
        return record.state, record.reason
    return status.state, status.reason


def _judge(
    record: EndpointRecord,
    seen: Observed,
    ready: Sequence[ReplicaReport],
    current: Sequence[ReplicaReport],
) -> tuple[EndpointState, str | None]:
    if record.state is EndpointState.DELETE_IN_PROGRESS:
        return record.state, "replicas finish what they have"
    if current:
        return EndpointState.READY, _shortcoming(seen, ready)
    if seen.deployed and seen.replicas_wanted == 0 and not seen.problem:
        return EndpointState.READY, "asleep: the next request starts a replica"
    reason = _failure(seen)
    if reason is not None:
        serving = "the update failed, an earlier version serves on: " if ready else ""
        return EndpointState.UPDATE_FAILED, serving + reason
    if not seen.deployed:
        return EndpointState.UPDATE_PENDING, None
    serving = "an earlier version serves while the new one starts: " if ready else ""
    return EndpointState.UPDATE_IN_PROGRESS, serving + _progress(seen)


def _failure(seen: Observed) -> str | None:
    if seen.problem:
        return seen.problem
    if seen.failed:
        return seen.last_error or _sentence(seen.message)
    if seen.failures >= MOST_FAILURES:
        return seen.last_error
    return seen.starved


def _shortcoming(seen: Observed, ready: Sequence[ReplicaReport]) -> str | None:
    """What a READY endpoint still lacks."""
    if len(ready) >= seen.replicas_wanted:
        return None
    return f"{len(ready)} of {seen.replicas_wanted} replicas are ready: {_progress(seen)}"


def _progress(seen: Observed) -> str:
    if seen.failures and seen.last_error:
        return f"trying again after: {seen.last_error}"
    starting = [r for r in seen.reports if r.state is ReplicaState.STARTING]
    if any(r.loaded_at for r in starting):
        return "a replica is warming up"
    if starting:
        return "a replica is loading the model"
    if seen.starved or seen.lacking:
        return f"waiting for resources: {seen.starved or seen.lacking}"
    return "a replica is being placed"


def _sentence(message: str) -> str:
    """The last line of a traceback, which is where Python says what it is about."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: ") if lines else "its replicas cannot start"
