"""Records of responses, conversations, streams and stored chats: frozen, and named once."""

from dataclasses import dataclass, field, fields
from typing import Any

from llm_engine.statuses import ResponseState, StreamState

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """One response, whatever dialect it came in. Items are as OpenAI's Responses API has them."""

    id: str
    owner: str
    dialect: str  # openai | sference: who made it
    model: str  # as it was called
    state: ResponseState
    created_at: float  # unix seconds
    expires_at: float
    background: bool = False
    streamed: bool = False  # its events are in the log
    #: What was asked for besides the input: instructions, tools, temperature, metadata, ...
    request: dict[str, Any] = field(default_factory=dict)
    #: Of this turn, each with an id.
    input: list[Item] = field(default_factory=list)
    output: list[Item] = field(default_factory=list)
    previous: str | None = None  # the response that it goes on from
    conversation: str | None = None  # or the conversation that it belongs to,
    context_until: int | None = None  # whose items it knows up to this one's serial
    stream: str | None = None
    custom_id: str | None = None  # sference's
    #: OpenAI's: code, message.
    error: dict[str, Any] | None = None
    incomplete: str | None = None  # why it is: max_output_tokens, ...
    #: OpenAI's: input_tokens, output_tokens, total_tokens and their details.
    usage: dict[str, Any] | None = None
    sees_all: bool = False  # made with a key that sees what every owner has
    ended_at: float | None = None
    #: Who works on it: a gateway, until `lease_until`.
    worker: str | None = None
    lease_until: float = 0.0
    starts: int = 0  # gateways that have claimed it
    cancel_asked: bool = False
    told: int = 0  # events in its log; the next one's sequence number


@dataclass(frozen=True, slots=True)
class ResponseEnd:
    """What a response has come to."""

    state: ResponseState
    output: list[Item] = field(default_factory=list)
    error: dict[str, Any] | None = None
    incomplete: str | None = None
    usage: dict[str, Any] | None = None
    #: What was not asked for and the engine has chosen: temperature, top_p.
    chosen: dict[str, float] = field(default_factory=dict)
    #: Who has answered, where it was another than was asked.
    model: str | None = None

    def of(self, record: ResponseRecord) -> dict[str, Any]:
        """What the record then says."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        chosen = said.pop("chosen")
        model = self.model or record.model
        return said | {"request": record.request | chosen, "model": model}


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    owner: str
    created_at: float
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """A named queue that responses are put into. `window`: sference's 1h | 24h."""

    id: str
    owner: str
    name: str
    window: str
    state: StreamState
    created_at: float
    updated_at: float
    cancelled_at: float | None = None
    archived_at: float | None = None


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """Of the responses in a stream that have not expired."""

    pending: int = 0
    running: int = 0
    completed: int = 0  # incomplete ones, too
    failed: int = 0
    cancelled: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    last: "FeedEntry | None" = None

    @property
    def total(self) -> int:
        return self.pending + self.running + self.completed + self.failed + self.cancelled


@dataclass(frozen=True, slots=True)
class FeedEntry:
    """That a response has ended. `serial` grows in the order in which they did."""

    serial: int
    response: ResponseRecord


@dataclass(frozen=True, slots=True)
class StoredChat:
    """A chat completion that was asked for with `store: true`."""

    id: str
    owner: str
    model: str
    created_at: float
    expires_at: float
    metadata: dict[str, str] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
