"""What a fine-tune goes on from, in the storage; the next job, on whatever node, begins there.

    fine_tunes/<id>/checkpoints/<step>-<tag>/<file>   the trainer's state; manifest.json is last
    fine_tunes/<id>/metrics/<step>-<tag>.csv          lines of the result file, up to that step

The tag is of the process that wrote it: one that has lost its lease can damage nothing. Metrics
stay; of the states only the newest does, and its manifest names the metrics that led up to it.
Blocking.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_engine.fine_tunes import folders
from llm_engine.fine_tunes.folders import MANIFEST, FolderBroken
from llm_engine.storage.base import NoSuchObject, Storage


@dataclass(frozen=True, slots=True)
class Checkpoint:
    prefix: str
    step: int
    epoch_end: bool
    metrics: dict[str, float]
    history: tuple[str, ...]  # keys of the metrics, in order
    tokens: int  # trained on so far
    files: tuple[folders.File, ...]


class Checkpoints:
    """Raise StorageUnavailable."""

    def __init__(self, storage: Storage, fine_tune: str, tag: str) -> None:
        self._storage = storage
        self._root = f"fine_tunes/{fine_tune}"
        self._tag = tag

    def put(
        self,
        folder: Path,
        step: int,
        *,
        epoch_end: bool,
        metrics: dict[str, float],
        history: Sequence[str],
        rows: bytes,
        tokens: int,
        check: Callable[[], None],
    ) -> Checkpoint:
        """`rows`: lines of the result file since the last of `history`. `check` raises where it
        must not come about. Raises OSError, too, where the folder cannot be read."""
        name = f"{step:08d}-{self._tag}"
        if rows:
            key = f"{self._root}/metrics/{name}.csv"
            self._storage.put(key, rows)
            history = [*history, key]
        prefix = f"{self._root}/checkpoints/{name}"
        about: dict[str, Any] = {
            "step": step,
            "epoch_end": epoch_end,
            "metrics": metrics,
            "history": list(history),
            "tokens": tokens,
        }
        folders.put(self._storage, prefix, folder, folders.names_in(folder), about, check)
        found = self._read(prefix)
        assert found is not None, "what was just written is gone"
        return found

    def newest(self, besides: Sequence[str] = ()) -> Checkpoint | None:
        """The one with the most steps that is complete; `besides`: prefixes that are no good."""
        complete = sorted(
            (
                each.key.removesuffix(f"/{MANIFEST}")
                for each in self._storage.list(f"{self._root}/checkpoints/")
                if each.key.endswith(f"/{MANIFEST}")
            ),
            reverse=True,
        )
        for prefix in complete:
            if prefix not in besides and (found := self._read(prefix)) is not None:
                return found
        return None

    def fetch(self, checkpoint: Checkpoint, folder: Path) -> bool:
        """False where it is damaged, or gone."""
        try:
            folders.get(self._storage, checkpoint.prefix, checkpoint.files, folder)
        except (NoSuchObject, FolderBroken):
            return False
        return True

    def drop_older(self, than: Checkpoint) -> None:
        """All states with fewer steps, those that were never complete, too."""
        begun = {
            "/".join(each.key.split("/")[:4])
            for each in self._storage.list(f"{self._root}/checkpoints/")
        }
        for prefix in begun:
            if prefix.rpartition("/")[2] < than.prefix.rpartition("/")[2]:
                folders.drop(self._storage, prefix)

    def _read(self, prefix: str) -> Checkpoint | None:
        try:
            told = folders.manifest(self._storage, prefix)
            return Checkpoint(
                prefix,
                int(told["step"]),
                bool(told["epoch_end"]),
                dict(told["metrics"]),
                tuple(told["history"]),
                int(told["tokens"]),
                folders.files_of(told),
            )
        except (NoSuchObject, FolderBroken, KeyError, TypeError, ValueError):
            return None
