"""What state an endpoint is in, from what was observed. Pure, and the only place to decide it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from llm_engine.config import EndpointSettings
from llm_engine.records import EndpointStatus, ReplicaReport
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
    deployed: bool = False  # its application exists
    failed: bool = False  # the cluster has given up starting it
    message: str = ""  # the cluster's own words
    problem: str | None = None  # why it could not even be handed to the cluster
    generation: str = ""  # the version that is wanted
    lacking: str | None = None  # "needs 4 GPUs, the cluster has 2"
    replicas_wanted: int = 0


def derive(settings: EndpointSettings, seen: Observed, created: int) -> EndpointStatus:
    """READY means that a replica has answered; a failure carries its cause."""
    ready = [r for r in seen.reports if r.state is ReplicaState.READY]
    reasons = [r.reason for r in seen.reports if r.state is ReplicaState.FAILED and r.reason]
    if ready:
        state, reason = EndpointState.READY, _shortcoming(seen, ready, reasons)
    elif seen.failed or seen.problem:
        state = EndpointState.UPDATE_FAILED
        reason = seen.problem or (reasons[-1] if reasons else _sentence(seen.message))
    elif not seen.deployed:
        state, reason = EndpointState.UPDATE_PENDING, None
    else:
        state = EndpointState.UPDATE_IN_PROGRESS
        reason = _progress(seen, reasons)
    lengths = [r.max_model_len for r in ready if r.max_model_len]
    return EndpointStatus(
        name=settings.name,
        model=settings.model,
        task=settings.task,
        state=state,
        reason=reason,
        replicas_wanted=seen.replicas_wanted,
        replicas_ready=len(ready),
        created=created,
        max_queue=settings.max_queue,
        max_model_len=min(lengths, default=0),
    )


def _shortcoming(
    seen: Observed, ready: Sequence[ReplicaReport], reasons: Sequence[str]
) -> str | None:
    """What a READY endpoint still lacks."""
    if seen.problem or seen.failed:
        cause = seen.problem or (reasons[-1] if reasons else _sentence(seen.message))
        return f"the update failed, an earlier version serves on: {cause}"
    if seen.generation and all(r.generation != seen.generation for r in ready):
        return f"an earlier version serves while the new one starts: {_progress(seen, reasons)}"
    if len(ready) < seen.replicas_wanted:
        cause = reasons[-1] if reasons else _progress(seen, reasons)
        return f"{len(ready)} of {seen.replicas_wanted} replicas are ready: {cause}"
    return None


def _progress(seen: Observed, reasons: Sequence[str]) -> str:
    if reasons:
        return f"trying again after: {reasons[-1]}"
    if any(r.state is ReplicaState.STARTING for r in seen.reports):
        return "a replica is loading the model"
    if seen.lacking:
        return f"waiting for resources: {seen.lacking}"
    return "a replica is being placed"


def _sentence(message: str) -> str:
    """The last line of a traceback, which is where Python says what it is about."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1].removeprefix("RuntimeError: ") if lines else "its replicas cannot start"
