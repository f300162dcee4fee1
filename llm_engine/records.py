"""What crosses a process boundary: frozen, picklable, and named once."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from llm_engine.statuses import BatchState, EndpointState, FineTuneState, ReplicaState


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is doing: a snapshot of gauges, and counters since its start."""

    running: int = 0  # requests being generated
    waiting: int = 0  # requests queued in the engine
    kv_cache_usage: float = 0.0  # 0..1
    prompt_tokens: int = 0  # counter
    generated_tokens: int = 0  # counter
    batches: int = 0  # of those running and waiting: requests of batches
    step_s: float = 0.0  # a step of the engine takes so long, before any request; 0: unknown
    request_s: float = 0.0  # and so much longer with each
    adapters: tuple[str, ...] = ()  # ids of those in the engine's memory
    slots: int = 0  # requests that it can run at a time; 0: unknown

    @property
    def depth(self) -> int:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Phases:
    """How long each phase of a start took, in seconds; None: not over yet."""

    queued: float | None = None  # accepted, not yet handed to the cluster
    scheduling: float | None = None  # until a node runs the replica's process
    loading: float | None = None  # until the model is in memory
    warming: float | None = None  # until it has generated a token

    @property
    def total(self) -> float | None:
        parts = (self.queued, self.scheduling, self.loading, self.warming)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


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
    began_at: float = 0.0  # unix seconds: its process runs
    loaded_at: float = 0.0  # the model is in memory
    ready_at: float = 0.0  # it has generated a token
    weights: str = ""  # the model that it serves, as its endpoint's settings had it
    max_adapters: int = 0  # in its memory at a time

    def plain(self) -> dict[str, Any]:
        """As plain data, without what opens its port."""
        return {key: value for key, value in asdict(self).items() if key != "secret"}


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint as the controller sees it, and all that a request's way depends on."""

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
    public: bool = True  # whoever has a key may use it
    fallback: str | None = None  # the model that answers when this one can't
    sleeps: bool = False  # it may be without replicas until a request comes
    wake_timeout_s: float = 0.0  # how long such a request is held
    target_queue_depth: float = 16.0  # requests in an engine that autoscaling aims at
    max_replicas: int = 1
    priorities: bool = False  # its engines heed a request's `priority`
    generation: str = ""  # the version that is wanted
    phases: Phases = Phases()  # of the start under way, or of the last one
    eta_s: float | None = None  # until READY, learned from earlier starts
    last_error: str | None = None  # the last failure, also when it has passed
    max_adapters: int = 0  # in a replica's memory at a time; 0: it serves none
    max_adapter_rank: int = 0


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """Who serves what: all an ingress needs in order to send a request on its way."""

    version: int = 0
    endpoints: dict[str, EndpointStatus] = field(default_factory=dict)
    replicas: dict[str, tuple[ReplicaReport, ...]] = field(default_factory=dict)  # READY ones


class Scope(StrEnum):
    """What a key may do, beyond seeing what it may use."""

    INFERENCE = "inference"  # send requests to models
    FILES = "files"  # keep files, and run batches and fine-tunes over them
    MODELS = "models"  # register aliases and external models
    ENDPOINTS = "endpoints"  # create and change endpoints: as good as running code on the nodes
    METRICS = "metrics"  # read /metrics, where every endpoint's numbers are
    ADMIN = "admin"  # all of it, for every owner, and keys


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request."""

    owner: str
    scopes: frozenset[Scope]
    key: str | None = None  # the key's id; None: from the configuration, or no key was asked
    batch: str | None = None  # the batch that asks, with a ticket instead of a key
    priority: int = 0  # of its requests in an engine's queue: the lower, the earlier
    sees_all: bool = False  # a ticket of a batch whose maker did

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def sees(self, owner: str, public: bool = False) -> bool:
        return public or owner == self.owner or self.sees_everything

    @property
    def sees_everything(self) -> bool:
        return self.sees_all or Scope.ADMIN in self.scopes

    @property
    def whose(self) -> str | None:
        """The owner of what their lists hold; None: everybody's."""
        return None if self.sees_everything else self.owner


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key; the key itself is told once, when it is made, and kept nowhere."""

    id: str
    owner: str
    name: str
    digest: bytes = field(repr=False)  # SHA-256
    prefix: str = ""
    scopes: tuple[Scope, ...] = ()
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """An endpoint that somebody wants. `revision` counts its changes."""

    id: str
    name: str
    owner: str
    origin: str  # api | config | batch
    spec: dict[str, Any]  # EndpointSettings
    state: EndpointState
    created_at: float
    requested_at: float
    updated_at: float
    extras: dict[str, Any] = field(default_factory=dict)  # what a dialect keeps for its answers
    reason: str | None = None
    settled: bool = False
    revision: int = 0
    declared: str | None = None
    deployed: str | None = None
    phases: dict[str, float | None] | None = None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A registered model: an external upstream where it has a `url`, else an alias."""

    id: str
    owner: str
    name: str
    model: str | None = None
    url: str | None = None
    sealed_key: bytes | None = field(default=None, repr=False)  # encrypted
    max_token_count: int | None = None
    max_output_token_count: int | None = None
    fallback: str | None = None
    public: bool = False
    revision: int = 0  # counts changes
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    subject: str
    at: float  # unix seconds
    kind: str
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Directory:
    """Who may come in, and what is registered: pushed to every ingress when it changes."""

    version: int = 0
    keys: dict[bytes, KeyRecord] = field(default_factory=dict)  # by digest; revoked ones too
    models: dict[str, dict[str, ModelRecord]] = field(default_factory=dict)  # by owner and name
    adapters: dict[str, "AdapterRecord"] = field(default_factory=dict)  # by name


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file; its bytes lie in the storage under `key`."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    key: str
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """A file that comes in parts. `status`: pending | completed | cancelled | expired."""

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int  # as declared
    mime_type: str
    status: str
    created_at: float
    expires_at: float
    file_expires_after_s: int | None = None
    file_id: str | None = None


@dataclass(frozen=True, slots=True)
class UploadPart:
    id: str
    upload: str
    bytes: int
    key: str
    created_at: float


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What is asked of a batch beyond OpenAI's fields."""

    output_expires_after_s: int | None = None
    #: EndpointSettings of engines of its own, for as long as it runs; None: the live replicas.
    own_engine: dict[str, Any] | None = None
    #: Where the input comes from, if not from a file: a path or URL within batches.data_paths.
    input_path: str | None = None
    #: Where the results go besides the output file, and in which form: scale_v1 | scale_v2.
    output_path: str | None = None
    output_form: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    #: What a dialect keeps for its answers.
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, summed over rows."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch, whatever dialect it came in. Counts and usage are of rows that are durable."""

    id: str
    owner: str
    dialect: str  # openai | llm_engine | sference: who made it
    endpoint: str  # the path of each row: /v1/chat/completions, ...
    input_file_id: str
    window_s: float
    state: BatchState
    created_at: float
    expires_at: float
    model: str | None = None  # None until its rows have been read
    sees_all: bool = False  # made with a key that sees what every owner has
    #: Unix seconds of each state's beginning, by state.
    times: dict[str, float] = field(default_factory=dict)
    #: The state that follows `finalizing` or `cancelling`: completed | expired | cancelled.
    outcome: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = Usage()
    #: OpenAI's: code, message, param, line.
    errors: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None  # one sentence: what it waits for, or why it failed
    metadata: dict[str, str] | None = None
    options: BatchOptions = BatchOptions()
    output_file_id: str | None = None
    error_file_id: str | None = None
    #: Who works on it: a job's process. Only it may add parts, and only until `lease_until`.
    worker: str | None = None
    lease_until: float = 0.0
    starts: int = 0  # jobs that have claimed it
    idle_starts: int = 0  # the last of them, in a row, that got nowhere
    #: As its worker sees it: rows_per_s, tokens_per_s, in_flight, ...
    progress: dict[str, float] = field(default_factory=dict)
    revision: int = 0

    def began(self, state: BatchState) -> float | None:
        """When it came into that state, in unix seconds."""
        return self.times.get(state)


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Finished rows that are in the storage under `key`, one JSON line each, in `rows`' order."""

    number: int
    key: str
    rows: tuple[int, ...]  # by their place in the input, from 0
    failed: int  # of them
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class FineTuneRecord:
    """One fine-tune, whatever dialect it came in: from a model and a file to an adapter."""

    id: str
    owner: str
    dialect: str  # openai | llm_engine: who made it
    base: str  # the endpoint whose model is trained on, and which will serve the adapter
    weights: str  # that model: builtin:chat, a folder, or a Hugging Face id
    training_file_id: str
    method: str  # supervised | dpo
    name: str  # of the model that comes of it; usable once it has succeeded
    seed: int
    state: FineTuneState
    created_at: float
    parent: str | None = None  # the adapter that it goes on from
    validation_file_id: str | None = None
    suffix: str | None = None
    #: What was asked for, by TrainingPlan's names, numbers or "auto"; `plan`: what became of it.
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    #: What a dialect keeps for its answers.
    extras: dict[str, Any] = field(default_factory=dict)
    sees_all: bool = False  # made with a key that sees what every owner has
    #: Unix seconds of each state's last beginning, by state.
    times: dict[str, float] = field(default_factory=dict)
    step: int = 0  # optimizer steps that are durable
    total_steps: int = 0  # 0: not known yet
    trained_tokens: int | None = None
    #: OpenAI's: code, message, param.
    error: dict[str, Any] | None = None
    reason: str | None = None  # one sentence: what it waits for
    adapter: str | None = None  # the id of what came of it
    result_file_id: str | None = None
    #: Who works on it: a job's process, until `lease_until`.
    worker: str | None = None
    lease_until: float = 0.0
    starts: int = 0  # jobs that have claimed it
    idle_starts: int = 0  # the last of them, in a row, that got nowhere
    #: As its worker sees it: steps_per_s, tokens_per_s, train_loss, left_s, ...
    progress: dict[str, float] = field(default_factory=dict)
    revision: int = 0

    def began(self, state: FineTuneState) -> float | None:
        """When it came into that state last, in unix seconds."""
        return self.times.get(state)


@dataclass(frozen=True, slots=True)
class FineTuneEvent:
    """What a fine-tune tells of itself; `data` of metrics: step, train_loss, ..."""

    id: int
    fine_tune: str
    at: float  # unix seconds
    level: str  # info | warn | error
    message: str
    type: str = "message"  # message | metrics
    data: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """LoRA weights that the replicas of `base` serve under `name`: a fine-tune's result, or one of
    its checkpoints. In the storage: `adapters/<id>/`, with manifest.json written last."""

    id: str  # what engines call it
    name: str  # what clients call it
    owner: str
    base: str  # the endpoint
    weights: str  # the model that it was trained on; the endpoint must still have it
    rank: int
    bytes: int
    created_at: float
    fine_tune: str | None = None
    step: int | None = None  # of a checkpoint; None: the fine-tune's result
    metrics: dict[str, float] = field(default_factory=dict)
    deleted_at: float | None = None  # its bytes go with the next sweep
