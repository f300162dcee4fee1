"""What crosses a process boundary: frozen, picklable, and named once."""

from dataclasses import dataclass, field

from llm_engine.statuses import EndpointState, ReplicaState


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is doing: a snapshot of gauges, and counters since its start."""

    running: int = 0  # requests being generated
    waiting: int = 0  # requests queued in the engine
    kv_cache_usage: float = 0.0  # 0..1
    prompt_tokens: int = 0  # counter
    generated_tokens: int = 0  # counter

    @property
    def depth(self) -> int:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One engine replica as it describes itself to the router."""

    endpoint: str
    replica: str  # Serve's replica id
    generation: str  # which version of the endpoint's configuration it runs
    state: ReplicaState
    host: str = ""
    port: int = 0
    secret: str = field(default="", repr=False)  # opens the engine's private port; never logged
    max_model_len: int = 0  # tokens
    load: Load = Load()
    reason: str | None = None  # why it failed


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint as the controller sees it."""

    name: str
    model: str
    task: str  # generate | embed
    state: EndpointState
    reason: str | None = None
    replicas_wanted: int = 0
    replicas_ready: int = 0
    created: int = 0  # unix seconds
    max_queue: int = 0  # requests a replica holds before more are refused
    max_model_len: int = 0  # tokens; 0 until a replica has told
    owned_by: str = "llm-engine"


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """Who serves what: all an ingress needs in order to send a request on its way."""

    version: int = 0
    endpoints: dict[str, EndpointStatus] = field(default_factory=dict)
    replicas: dict[str, tuple[ReplicaReport, ...]] = field(default_factory=dict)  # READY ones
