"""What a trainer is given, brought to this machine: examples that have been checked, the model that
it trains on, and the adapter that it goes on from. Blocking."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llm_engine.config import BUILTIN, Settings
from llm_engine.errors import LLMEngineError, NotFound
from llm_engine.fine_tunes import adapters, data
from llm_engine.fine_tunes.adapters import AdapterBroken
from llm_engine.records import FileRecord, FineTuneRecord
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.store.sql import Store

_TRAINING, _VALIDATION = "training_file", "validation_file"
#: `check` runs where tokens are passed on: after so many bytes it lets those go first.
_GENTLE_BYTES, _GENTLE_S = 16 * 1024, 0.0002


class Unfit(LLMEngineError):
    """The fine-tune cannot be, for a fault of its files or of its model."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message.replace("\0", ""), "param": param}


@dataclass(frozen=True, slots=True)
class Inputs:
    train: Path
    valid: Path | None
    weights: str  # builtin:chat, a folder, or a Hugging Face id
    parent: Path | None


def bring(
    settings: Settings, store: Store, storage: Storage, record: FineTuneRecord, folder: Path
) -> Inputs:
    """A second time does it again. Raises Unfit; StorageUnavailable, StoreUnavailable, OSError."""
    weights = _weights(record)
    reader = _Reader(settings, store, storage, record)
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    count = _write(reader.read(record.training_file_id, _TRAINING), train)
    share = record.hyperparameters.get("validation_split")
    held_out: Path | None = valid
    if record.validation_file_id is not None:
        _write(reader.read(record.validation_file_id, _VALIDATION), valid)
    elif isinstance(share, float | int):
        _split(train, valid, count, share, record.seed)
    else:
        held_out = None
    parent = None if record.parent is None else _parent(storage, record, folder / "parent")
    return Inputs(train, held_out, weights, parent)


def check(settings: Settings, store: Store, storage: Storage, record: FineTuneRecord) -> None:
    """Its files alone, line by line, before anything is reserved for it: nothing is written. Raises
    as `bring`, which would find the same."""
    reader = _Reader(settings, store, storage, record, gently=True)
    for file, param in (
        (record.training_file_id, _TRAINING),
        (record.validation_file_id, _VALIDATION),
    ):
        if file is not None:
            for _ in reader.read(file, param):
                pass


class _Reader:
    def __init__(
        self,
        settings: Settings,
        store: Store,
        storage: Storage,
        record: FineTuneRecord,
        gently: bool = False,
    ) -> None:
        self._limits = settings.fine_tunes
        self._store = store
        self._storage = storage
        self._record = record
        self._gently = gently

    def read(self, file: str, param: str) -> Iterator[dict[str, Any]]:
        """Its examples, one by one. Raises Unfit, at last where it is only the file that is."""
        found = self._find(file, param)
        reader = data.read(
            self._pieces(found, param),
            found.filename,
            self._record.method,
            self._limits.max_rows,
            param=param,
            fewest=data.FEWEST_EXAMPLES if param == _TRAINING else 1,
        )
        yield from reader
        problem = reader.verdict()
        if problem is not None:
            raise Unfit(problem.code, problem.message, problem.param)

    def _find(self, file: str, param: str) -> FileRecord:
        """One that its owner may use."""
        try:
            found = self._store.files.get(file)
        except NotFound:
            raise _no_file(file, param) from None
        if found.owner != self._record.owner and not self._record.sees_all:
            raise _no_file(file, param)
        most = self._limits.max_file_bytes
        if found.bytes > most:
            raise Unfit(
                "file_too_large",
                f"The file '{file}' has {found.bytes} bytes, more than {most} "
                "(fine_tunes.max_file_bytes).",
                param,
            )
        return found

    def _pieces(self, file: FileRecord, param: str) -> Iterator[bytes]:
        try:
            for piece in self._storage.read(file.key):
                yield from _slowly(piece) if self._gently else (piece,)
        except NoSuchObject:
            raise _no_file(file.id, param) from None


def _slowly(piece: bytes) -> Iterator[bytes]:
    for start in range(0, len(piece), _GENTLE_BYTES):
        yield piece[start : start + _GENTLE_BYTES]
        time.sleep(_GENTLE_S)


def _no_file(file: str, param: str) -> Unfit:
    message = f"The file '{file}' does not exist or has been deleted."
    return Unfit(f"invalid_{param}", message, param)


def _write(examples: Iterator[dict[str, Any]], path: Path) -> int:
    """How many."""
    count = 0
    with path.open("wb") as target:
        for example in examples:
            target.write(orjson.dumps(example) + b"\n")
            count += 1
    return count


def _split(train: Path, valid: Path, count: int, share: float, seed: int) -> None:
    """So many are held out, the same ones for a seed; at least one is left to train on."""
    held_out = min(max(1, round(share * count)), count - 1)
    chosen = set(random.Random(seed).sample(range(count), held_out))
    everything = train.with_name("all.jsonl")
    train.rename(everything)
    with everything.open("rb") as source, train.open("wb") as good, valid.open("wb") as rest:
        for place, line in enumerate(source):
            (rest if place in chosen else good).write(line)
    everything.unlink()


def _weights(record: FineTuneRecord) -> str:
    kind, _, name = record.weights.partition(":")
    path = Path(record.weights).expanduser()
    if kind == "builtin" and name in BUILTIN:
        return record.weights
    if path.is_dir():
        return str(path.absolute())
    if kind == "builtin" or path.is_absolute():
        raise Unfit(
            "model_not_found",
            f"The weights of '{record.base}' are not on this machine: there is no "
            f"{record.weights}.",
            "model",
        )
    return record.weights


def _parent(storage: Storage, record: FineTuneRecord, folder: Path) -> Path:
    assert record.parent is not None
    try:
        adapters.fetch(storage, record.parent, folder)
    except NoSuchObject:
        raise Unfit(
            "model_not_found", "The model that it goes on from has been deleted.", "model"
        ) from None
    except AdapterBroken as broken:
        raise Unfit("model_damaged", str(broken), "model") from None
    return folder
