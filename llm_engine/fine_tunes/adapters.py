"""Adapters in the storage: `adapters/<id>/<file>`, with manifest.json written last. Blocking."""

import logging
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from llm_engine.errors import LLMEngineError, NotFound
from llm_engine.fine_tunes import folders
from llm_engine.fine_tunes.folders import File, FolderBroken
from llm_engine.ids import new_id
from llm_engine.records import AdapterRecord
from llm_engine.storage.base import NoSuchObject, Storage, is_key

if TYPE_CHECKING:  # engines fetch adapters, too, and have no business with the store
    from llm_engine.store.sql import Store

logger = logging.getLogger("llm_engine.fine_tunes")

#: Of a checkpoint's folder: what serving and people need; the rest is for the trainer to go on.
SERVED = (
    "adapter_*", "*token*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "README.md", "metrics.json",
)  # fmt: skip
#: Bytes of no record may be those of an adapter that is being published.
ORPHAN_S = 6 * 3600.0


class AdapterBroken(LLMEngineError):
    """Its bytes are not those that were published; the text says which."""


@dataclass(frozen=True, slots=True)
class Manifest:
    id: str
    name: str
    base: str
    weights: str
    rank: int
    files: tuple[File, ...]
    created_at: float
    fine_tune: str | None
    step: int | None
    metrics: dict[str, float]


def new_adapter_id() -> str:
    return new_id("adapter", "-")


def served_in(folder: Path) -> list[str]:
    """The names of what is published of a folder."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SERVED)
    ]


def measure(folder: Path) -> tuple[int, int]:
    """The bytes that would be published of a folder, and the adapter's rank. Raises OSError, and
    ValueError where it holds no adapter."""
    names = served_in(folder)
    if "adapter_config.json" not in names or "adapter_model.safetensors" not in names:
        raise ValueError(f"the trainer has left no adapter in {folder.name}")
    config: dict[str, Any] = orjson.loads((folder / "adapter_config.json").read_bytes())
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return sum((folder / name).stat().st_size for name in names), max(map(int, ranks))


def publish(storage: Storage, folder: Path, record: AdapterRecord) -> None:
    """What serving needs of a folder. Raises StorageUnavailable, and OSError where the folder
    cannot be read."""
    about = {
        "id": record.id,
        "name": record.name,
        "base": record.base,
        "weights": record.weights,
        "rank": record.rank,
        "created_at": record.created_at,
        "fine_tune": record.fine_tune,
        "step": record.step,
        "metrics": record.metrics,
    }
    folders.put(storage, _prefix(record.id), folder, served_in(folder), about)


def manifest(storage: Storage, adapter: str) -> Manifest:
    """Raises NoSuchObject, AdapterBroken, StorageUnavailable."""
    if "/" in adapter or not is_key(adapter):
        raise NoSuchObject(f"There is no adapter '{adapter[:100]}'.")
    try:
        told = folders.manifest(storage, _prefix(adapter))
        return Manifest(
            **{key: told[key] for key in Manifest.__dataclass_fields__ if key != "files"},
            files=folders.files_of(told),
        )
    except (FolderBroken, KeyError) as error:
        raise AdapterBroken(f"The adapter '{adapter}' is damaged: {error}.") from None


def fetch(storage: Storage, adapter: str, folder: Path) -> Manifest:
    """Into `folder`, all of it at once; where that is there already, it stays as it is.

    Raises NoSuchObject where there is none, AdapterBroken, StorageUnavailable, and OSError where
    there is no room.
    """
    found = manifest(storage, adapter)
    try:
        folders.get(storage, _prefix(adapter), found.files, folder)
    except FolderBroken as error:
        raise AdapterBroken(f"The adapter '{adapter}' is damaged: {error}.") from None
    return found


def drop(storage: Storage, adapter: str) -> None:
    """Also where it is gone already. Raises StorageUnavailable."""
    folders.drop(storage, _prefix(adapter))


def sweep(store: "Store", storage: Storage) -> int:
    """The bytes of adapters that have been deleted. How many; raises StorageUnavailable or
    StoreUnavailable, and the next one goes on from there."""
    deleted = store.adapters.deleted()
    for record in deleted:
        drop(storage, record.id)
        store.adapters.forget(record.id)
    return len(deleted)


def sweep_orphans(store: "Store", storage: Storage) -> int:
    """Once in a while: what jobs have left that were killed. Lists all adapters, and all that
    fine-tunes keep to go on from. How many objects went; raises what `sweep` does."""
    swept = _sweep_unknown(store, storage)
    ended: dict[str, tuple[str, ...] | None] = {}
    for each in storage.list("fine_tunes/"):
        fine_tune = each.key.split("/")[1]
        if fine_tune not in ended:
            ended[fine_tune] = _kept_of(store, fine_tune)
        kept = ended[fine_tune]
        if kept is not None and each.key not in kept:
            storage.delete(each.key)
            swept += 1
    return swept


def sweep_fine_tune(store: "Store", storage: Storage, fine_tune: str) -> None:
    """What it kept to go on from, once it has ended; else nothing. Raises what `sweep` does."""
    kept = _kept_of(store, fine_tune)
    if kept is not None:
        for each in storage.list(f"fine_tunes/{fine_tune}/"):
            if each.key not in kept:
                storage.delete(each.key)


def _sweep_unknown(store: "Store", storage: Storage) -> int:
    """Adapters that were published, and never got a record."""
    unknown: dict[str, tuple[float, list[str]]] = {}
    for each in storage.list("adapters/"):
        adapter = each.key.split("/")[1]
        newest, keys = unknown.get(adapter, (0.0, []))
        unknown[adapter] = max(newest, each.modified_at), [*keys, each.key]
    # Read afterwards: an adapter that was recorded meanwhile is known.
    known = {record.id for record in (*store.adapters.all(), *store.adapters.deleted())}
    swept = 0
    for adapter, (newest, keys) in unknown.items():
        if adapter not in known and newest < time.time() - ORPHAN_S:
            logger.info("the adapter %s has no record: deleting it", adapter)
            for key in keys:
                storage.delete(key)
            swept += len(keys)
    return swept


def _kept_of(store: "Store", fine_tune: str) -> tuple[str, ...] | None:
    """The objects of a fine-tune's that stay, now that it has ended; None: it has not."""
    try:
        record = store.fine_tunes.get(fine_tune)
    except NotFound:
        return ()
    if not record.state.is_final:
        return None
    try:
        return (
            () if record.result_file_id is None else (store.files.get(record.result_file_id).key,)
        )
    except NotFound:
        return ()


def _prefix(adapter: str) -> str:
    return f"adapters/{adapter}"
