"""Records to put into a store, and ways to make things happen at once."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import sqlalchemy as sa

from llm_engine.config import EndpointSettings
from llm_engine.errors import APIError
from llm_engine.ids import new_id
from llm_engine.records import (
    BatchRecord,
    EndpointRecord,
    FileRecord,
    KeyRecord,
    ModelRecord,
    Scope,
    UploadPart,
    UploadRecord,
)
from llm_engine.responses import ResponseRecord
from llm_engine.statuses import BatchState, EndpointState, ResponseState
from llm_engine.store.endpoints import Change
from llm_engine.store.sql import Store
from tests.support.cluster import eventually

LIMIT = 1000
ENGINE = {"vllm_args": {"max_model_len": 64}}  # another engine
LIGHT: dict[str, Any] = {"fallback": "other"}  # the same engine


def spec(name: str = "m", **changes: Any) -> EndpointSettings:
    return EndpointSettings(name=name, model="x", **changes)


def create(store: Store, name: str = "m", **extras: Any) -> EndpointRecord:
    return store.endpoints.create(spec(name), "ann", extras, LIMIT)


def declare(store: Store, **changes: Any) -> EndpointRecord:
    """The only endpoint of the configuration."""
    assert store.endpoints.declare([spec(**changes)]) == []
    return store.endpoints.get("m")


def settle(
    store: Store, record: EndpointRecord, state: str = "READY", reason: str | None = None
) -> EndpointRecord:
    settled = store.endpoints.observe(record, EndpointState(state), reason, True, None)
    assert settled is not None
    return settled


def ready(store: Store, name: str = "m") -> EndpointRecord:
    return settle(store, create(store, name))


def to(**values: Any) -> Change:
    """A change of settings, for `ask_change`."""
    return lambda record: (EndpointSettings.model_validate(record.spec | values), record.extras)


def key(owner: str = "ann", **facts: Any) -> KeyRecord:
    made = new_id("key")
    given = {"name": "k", "digest": made.encode()[-32:].ljust(32), "prefix": "sk-le-1",
             "scopes": (Scope.INFERENCE, Scope.MODELS), "created_at": time.time()}  # fmt: skip
    return KeyRecord(made, owner, **given | facts)


def model(owner: str = "ann", name: str = "alias", **facts: Any) -> ModelRecord:
    now = time.time()
    given = {"model": "m", "created_at": now, "updated_at": now}
    return ModelRecord(new_id("model"), owner, name, **given | facts)


def file(owner: str = "ann", **facts: Any) -> FileRecord:
    made = new_id("file", "-")
    given = {"purpose": "batch", "filename": "a.jsonl", "bytes": 7, "created_at": time.time(),
             "key": f"files/{made}"}  # fmt: skip
    return FileRecord(made, owner, **given | facts)


def upload(owner: str = "ann", **facts: Any) -> UploadRecord:
    now = time.time()
    given = {"purpose": "user_data", "filename": "a.bin", "bytes": 10, "mime_type": "text/plain",
             "status": "pending", "created_at": now, "expires_at": now + 3600}  # fmt: skip
    return UploadRecord(new_id("upload"), owner, **given | facts)


def part(of: UploadRecord, bytes: int = 5) -> UploadPart:
    made = new_id("part")
    return UploadPart(made, of.id, bytes, f"uploads/{of.id}/{made}", time.time())


def batch(owner: str = "ann", **facts: Any) -> BatchRecord:
    now = time.time()
    given = {"dialect": "openai", "endpoint": "/v1/chat/completions", "input_file_id": "file-1",
             "window_s": 86400.0, "state": BatchState.VALIDATING, "created_at": now,
             "expires_at": now + 86400.0}  # fmt: skip
    return BatchRecord(new_id("batch"), owner, **given | facts)


def message(text: str = "hello", role: str = "user") -> dict[str, Any]:
    content = [{"type": "input_text" if role == "user" else "output_text", "text": text}]
    return {"id": new_id("msg"), "type": "message", "role": role, "content": content}


def response(owner: str = "ann", **facts: Any) -> ResponseRecord:
    """In the background, and waiting."""
    now = time.time()
    given = {"dialect": "openai", "model": "m", "state": ResponseState.QUEUED, "created_at": now,
             "expires_at": now + 3600, "background": True, "input": [message()]}  # fmt: skip
    return ResponseRecord(new_id("resp"), owner, **given | facts)


def kinds(store: Store, subject: str) -> list[str]:
    return [event.kind for event in store.events(subject)]


def race(*attempts: Callable[[], Any]) -> list[Any]:
    """What each gave, or how it was refused; all begin at once."""
    together = threading.Barrier(len(attempts))

    def go(attempt: Callable[[], Any]) -> Any:
        together.wait(10)
        try:
            return attempt()
        except APIError as refused:
            return refused

    with ThreadPoolExecutor(len(attempts)) as pool:
        return list(pool.map(go, attempts))


def race_of(stores: list[Store], attempt: Callable[[Store, int], Any]) -> list[Any]:
    """The same on each of these, told apart by number."""
    return race(*[partial(attempt, each, number) for number, each in enumerate(stores)])


def codes(given: list[Any]) -> list[str | None]:
    return [each.code for each in given if isinstance(each, APIError)]


def during_a_change(store: Store, attempt: Callable[[], Any], **values: Any) -> Any:
    """What `attempt` gives that begins while a change of "m" is about to be committed.

    PostgreSQL: on SQLite transactions do not overlap.
    """
    with ThreadPoolExecutor(1) as pool:
        begun: list[Future[Any]] = []

        def change(record: EndpointRecord) -> tuple[EndpointSettings, dict[str, Any]]:
            begun.append(pool.submit(attempt))
            eventually(lambda: waiting(store) or begun[0].done(), 15, 0.01, "it does not wait")
            return to(**values)(record)

        store.endpoints.ask_change("m", change)
        return begun[0].result(10)


def waiting(store: Store) -> int:
    """How many transactions wait for another's end."""
    with store.database.reading() as connection:
        counted = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return connection.execute(counted).scalar() or 0
