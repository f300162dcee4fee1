"""Adapters: their records, and what lies in the storage."""

import json
import time
from pathlib import Path
from typing import Any

from llm_engine.fine_tunes.adapters import new_adapter_id, publish
from llm_engine.records import AdapterRecord
from llm_engine.storage.base import Storage
from llm_engine.store import adapters
from llm_engine.store.sql import Store


def adapter(name: str = "ft:fake:me::1", **changes: Any) -> AdapterRecord:
    defaults: dict[str, Any] = {
        "id": new_adapter_id(), "name": name, "owner": "me", "base": "fake", "weights": "none",
        "rank": 8, "bytes": 100, "created_at": time.time(),
    }  # fmt: skip
    return AdapterRecord(**(defaults | changes))


def folder_of(path: Path, weights: bytes = b"weights") -> Path:
    """What a trainer leaves, as far as a fake engine looks."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"r": 8, "peft_type": "LORA"}))
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def record(store: Store, made: AdapterRecord) -> None:
    """As a fine-tune's job does at its end."""
    with store.database.writing() as connection:
        assert adapters.add(connection, made)


def served(store: Store, storage: Storage, folder: Path, **values: Any) -> AdapterRecord:
    """One that can be asked."""
    made = adapter(**values)
    publish(storage, folder_of(folder), made)
    record(store, made)
    return made
