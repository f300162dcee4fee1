"""The tables. A change here needs a migration; tests/stores compares the two.

Times are unix seconds. What only one dialect knows of a record lies in its `extras`.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Time = Float(53).with_variant(DOUBLE_PRECISION(), "postgresql")
_Serial = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only INTEGER keys itself

#: One row: which database this is. Processes that must share a store compare it.
identity = Table(
    "identity",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("secret", LargeBinary(32)),  # signs links and the tickets of jobs
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False, index=True),
    Column("name", String(100), nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),  # SHA-256 of the key
    Column("prefix", String(20), nullable=False),  # what may be shown of it
    Column("scopes", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time),
    Column("revoked_at", _Time),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("owner", String(100), nullable=False, index=True),
    Column("origin", String(20), nullable=False),  # api | config | batch
    Column("spec", JSON, nullable=False),  # EndpointSettings
    Column("extras", JSON, nullable=False),
    Column("state", String(30), nullable=False),
    Column("reason", Text),
    Column("settled", Boolean, nullable=False),  # the last operation has come to its end
    Column("revision", Integer, nullable=False),  # counts changes: what compare-and-set compares
    Column("declared", String(40)),  # the configuration's own version, as last applied
    Column("deployed", String(40)),  # the generation that was last handed to the cluster
    Column("phases", JSON),  # seconds of each phase of the last start
    Column("created_at", _Time, nullable=False),
    Column("requested_at", _Time, nullable=False),  # when the last operation was accepted
    Column("updated_at", _Time, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("name", String(200), nullable=False),
    Column("model", String(200)),
    Column("url", String(1024)),
    Column("sealed_key", LargeBinary),  # the upstream's key, encrypted
    Column("max_token_count", Integer),
    Column("max_output_token_count", Integer),
    Column("fallback", String(200)),
    Column("public", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),  # counts changes
    Column("created_at", _Time, nullable=False),
    Column("updated_at", _Time, nullable=False),
    UniqueConstraint("owner", "name"),
)

events = Table(
    "events",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("subject", String(40), nullable=False),  # a record's id
    Column("at", _Time, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("message", Text),
    Index(None, "subject", "id"),
)

#: How long earlier starts took, by what was started: where an ETA comes from.
starts = Table(
    "starts",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("signature", String(40), nullable=False, index=True),
    Column("at", _Time, nullable=False),
    Column("seconds", _Time, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("filename", String(1024), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("key", String(200), nullable=False),  # in the storage
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time, index=True),
    Index(None, "owner", "id"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False, index=True),
    Column("purpose", String(40), nullable=False),
    Column("filename", String(1024), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("mime_type", String(200), nullable=False),
    Column("status", String(20), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time, nullable=False, index=True),
    Column("file_expires_after_s", Integer),
    Column("file_id", String(40)),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("upload", String(40), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("key", String(200), nullable=False),
    Column("created_at", _Time, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("dialect", String(20), nullable=False),
    Column("endpoint", String(100), nullable=False),
    Column("input_file_id", String(200), nullable=False),
    Column("model", String(440)),
    Column("sees_all", Boolean, nullable=False),
    Column("window_s", _Time, nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("outcome", String(20)),
    Column("times", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time, nullable=False),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("usage", JSON, nullable=False),
    Column("errors", JSON, nullable=False),
    Column("reason", Text),
    Column("metadata", JSON),
    Column("options", JSON, nullable=False),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("worker", String(80)),
    Column("lease_until", _Time, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("idle_starts", Integer, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("revision", Integer, nullable=False),
    Index(None, "owner", "id"),
)

#: What of a batch is done: a row is finished when the part that holds it stands here.
batch_parts = Table(
    "batch_parts",
    metadata,
    Column("batch", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("key", String(200), nullable=False),
    Column("rows", JSON, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("usage", JSON, nullable=False),
)

#: What a request with an Idempotency-Key has made, so that it makes nothing twice.
idempotency = Table(
    "idempotency",
    metadata,
    Column("owner", String(100), primary_key=True),
    Column("route", String(60), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),  # SHA-256 of the request's body
    Column("subject", String(40), nullable=False),  # the id of what was made
    Column("at", _Time, nullable=False, index=True),
)

fine_tunes = Table(
    "fine_tunes",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("dialect", String(20), nullable=False),
    Column("base", String(200), nullable=False),
    Column("weights", Text, nullable=False),
    Column("parent", String(40)),
    Column("training_file_id", String(200), nullable=False),
    Column("validation_file_id", String(200)),
    Column("method", String(20), nullable=False),
    Column("name", String(400), nullable=False),
    Column("suffix", String(64)),
    Column("seed", BigInteger, nullable=False),
    Column("hyperparameters", JSON, nullable=False),
    Column("plan", JSON),
    Column("metadata", JSON),
    Column("extras", JSON, nullable=False),
    Column("sees_all", Boolean, nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("times", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("step", Integer, nullable=False),
    Column("total_steps", Integer, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("error", JSON),
    Column("reason", Text),
    Column("adapter", String(40)),
    Column("result_file_id", String(40)),
    Column("worker", String(80)),
    Column("lease_until", _Time, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("idle_starts", Integer, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("revision", Integer, nullable=False),
    Index(None, "owner", "id"),
)

fine_tune_events = Table(
    "fine_tune_events",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("fine_tune", String(40), nullable=False, index=True),
    Column("at", _Time, nullable=False),
    Column("level", String(10), nullable=False),
    Column("type", String(10), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON),
)

#: LoRA weights by name; a checkpoint of a fine-tune has a `step`.
adapters = Table(
    "adapters",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(440), nullable=False, unique=True),
    Column("owner", String(100), nullable=False),
    Column("base", String(200), nullable=False),
    Column("weights", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("fine_tune", String(40), index=True),
    Column("step", Integer),
    Column("metrics", JSON, nullable=False),
    Column("deleted_at", _Time),
)

#: Responses. `input` and `output` are of this one turn: what came before is found by `previous`,
#: or in the conversation up to `context_until`.
responses = Table(
    "responses",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("dialect", String(20), nullable=False),
    Column("model", String(440), nullable=False),
    Column("state", String(20), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("ended_at", _Time),
    Column("expires_at", _Time, nullable=False, index=True),
    Column("background", Boolean, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("request", JSON, nullable=False),
    Column("input", JSON, nullable=False),
    Column("output", JSON, nullable=False),
    Column("previous", String(40)),
    Column("conversation", String(40)),
    Column("context_until", BigInteger),
    Column("stream", String(40)),
    Column("custom_id", String(512)),
    Column("error", JSON),
    Column("incomplete", String(40)),
    Column("usage", JSON),
    Column("sees_all", Boolean, nullable=False),
    Column("worker", String(80)),
    Column("lease_until", _Time, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("cancel_asked", Boolean, nullable=False),
    Column("told", Integer, nullable=False),  # events that are in its log
    Index(None, "owner", "id"),
    Index(None, "owner", "state"),
    Index(None, "state", "id"),
    Index(None, "stream", "id"),
    Index(None, "stream", "state"),
    Index(None, "worker", "state"),
)

#: A response's server-sent events, a few to a row: from `first` to `last`, in JSON.
response_events = Table(
    "response_events",
    metadata,
    Column("response", String(40), primary_key=True),
    Column("first", Integer, primary_key=True, autoincrement=False),
    Column("last", Integer, nullable=False),
    Column("events", Text, nullable=False),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False, index=True),
    Column("created_at", _Time, nullable=False),
    Column("metadata", JSON, nullable=False),
)

conversation_items = Table(
    "conversation_items",
    metadata,
    Column("serial", _Serial, primary_key=True, autoincrement=True),
    Column("conversation", String(40), nullable=False),
    Column("item", String(80), nullable=False),
    Column("data", JSON, nullable=False),
    UniqueConstraint("conversation", "item"),
    Index(None, "conversation", "serial"),
    sqlite_autoincrement=True,
)

#: sference's named queues of responses.
streams = Table(
    "streams",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(100), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("window", String(10), nullable=False),
    Column("state", String(20), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("updated_at", _Time, nullable=False),
    Column("cancelled_at", _Time),
    Column("archived_at", _Time),
)

#: What has come to an end, in the order in which it did: `serial` is given out under a lock, so
#: that whoever has read up to one misses none.
feed = Table(
    "feed",
    metadata,
    Column("serial", _Serial, primary_key=True, autoincrement=True),
    Column("owner", String(100), nullable=False),
    Column("stream", String(40)),
    Column("response", String(40), nullable=False, index=True),
    Index(None, "owner", "stream", "serial"),
    sqlite_autoincrement=True,
)

#: Chat completions that were asked for with `store: true`.
chats = Table(
    "chats",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("model", String(440), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time, nullable=False, index=True),
    Column("metadata", JSON, nullable=False),
    Column("request", JSON, nullable=False),
    Column("answer", JSON, nullable=False),
    Index(None, "owner", "created_at", "id"),
)
