"""Adapters on a node's disk, for the engines that run there: each fetched once, checked, and kept
until there are too many bytes of others. Blocking.

    <folder>/<adapter id>/            its files, put there all at once
    <folder>/<adapter id>.json        its manifest; written last
    <folder>/<adapter id>.lock        held by whoever changes it, shared by whoever has it loaded

The locks are the kernel's: they end with the process that holds them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Self

import orjson

from llm_engine.config import Settings
from llm_engine.engine.adapters import AdapterSource
from llm_engine.fine_tunes.adapters import Manifest, fetch
from llm_engine.fine_tunes.folders import File
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.storage.opening import open_storage

logger = logging.getLogger("llm_engine.engine")

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
MOST_CHECKED = 1_000
#: Of a fetch by somebody else that is waited for.
LONGEST_S = 600.0


class Opened:
    """An adapter's folder, which stays as it is until `close`."""

    def __init__(self, path: Path, manifest: Manifest, lock: int) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock

    def close(self) -> None:
        os.close(self._lock)


class AdapterCache:
    """Of one process; others may use the same folder. Its methods may be called from any thread,
    but not for one adapter at a time."""

    def __init__(self, storage: Storage, folder: Path, max_bytes: int) -> None:
        self._storage = storage
        self._folder = folder
        self._max_bytes = max_bytes
        #: What this process has compared with its checksums, so that it does so once.
        self._checked: OrderedDict[str, None] = OrderedDict()

    @classmethod
    def of(cls, source: AdapterSource) -> Self:
        storage = open_storage(Settings.model_validate({"storage": source.storage}))
        return cls(storage, Path(source.folder), source.max_bytes)

    def open(self, adapter: str) -> Opened:
        """Fetched where it is not here. Raises NoSuchObject where there is none, AdapterBroken,
        StorageUnavailable, and OSError where there is no room."""
        if not _ID.fullmatch(adapter):
            raise NoSuchObject(f"There is no adapter '{adapter[:100]}'.")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            lock = self._lock(adapter, fcntl.LOCK_SH)  # waits for whoever fetches it
            assert lock is not None
            manifest = self._here(adapter)
            if manifest is not None:
                os.utime(self._folder / adapter)  # it was used
                self._make_room()
                return Opened(self._folder / adapter, manifest, lock)
            os.close(lock)
            self._fetch(adapter)
        raise OSError(f"the adapter {adapter} on this node is damaged, and in use")

    def remove(self, adapter: str) -> bool:
        """False where somebody has it loaded."""
        if not _ID.fullmatch(adapter) or not self._folder.is_dir():
            return True  # there is nothing
        lock = self._lock(adapter, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return False
        try:
            self._remove(adapter)
            return True
        finally:
            os.close(lock)

    # -- with the lock

    def _here(self, adapter: str) -> Manifest | None:
        """Its manifest, if it is here with all of its bytes."""
        path = self._folder / adapter
        try:
            told = orjson.loads(self._manifest_path(adapter).read_bytes())
            files = tuple(File(**file) for file in told.pop("files"))
            manifest = Manifest(**told, files=files)
            for file in files:
                if (path / file.name).stat().st_size != file.bytes:
                    raise ValueError(f"{file.name} has another size")
                if adapter not in self._checked and _sha256(path / file.name) != file.sha256:
                    raise ValueError(f"{file.name} has another checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("the adapter %s on this node is damaged: %s", adapter, error)
            return None
        self._note_checked(adapter)
        return manifest

    def _fetch(self, adapter: str) -> None:
        """Nothing, where somebody else is about to."""
        lock = self._lock(adapter, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            time.sleep(0.05)
            return
        try:
            if self._here(adapter) is not None:
                return
            self._remove(adapter, keep_lock=True)
            manifest = fetch(self._storage, adapter, self._folder / adapter)
            path = self._manifest_path(adapter)
            unfinished = path.with_suffix(".new")
            unfinished.write_bytes(orjson.dumps(asdict(manifest)))
            unfinished.rename(path)
            self._note_checked(adapter)
        except BaseException:
            self._remove(adapter)
            raise
        finally:
            os.close(lock)

    def _remove(self, adapter: str, keep_lock: bool = False) -> None:
        self._checked.pop(adapter, None)
        self._manifest_path(adapter).unlink(missing_ok=True)
        shutil.rmtree(self._folder / adapter, ignore_errors=True)
        if not keep_lock:
            self._lock_path(adapter).unlink(missing_ok=True)

    def _note_checked(self, adapter: str) -> None:
        self._checked[adapter] = None
        self._checked.move_to_end(adapter)
        while len(self._checked) > MOST_CHECKED:
            self._checked.popitem(last=False)

    # -- the bound

    def _make_room(self) -> None:
        """The least recently used go, but for those that an engine has loaded."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if not path.is_dir():
                    continue
                used_at = path.stat().st_mtime
                if path.name.startswith("."):  # being fetched, or left behind by who was killed
                    if used_at < time.time() - LONGEST_S:
                        shutil.rmtree(path, ignore_errors=True)
                elif not self._manifest_path(path.name).exists():
                    self.remove(path.name)
                else:
                    size = sum(file.stat().st_size for file in path.iterdir())
                    found.append((used_at, size, path.name))
        total = sum(size for _, size, _ in found)
        for _, size, adapter in sorted(found):
            if total <= self._max_bytes:
                return
            if self.remove(adapter):
                logger.info("the adapter %s makes room on this node for others", adapter)
                total -= size

    # -- locks

    def _lock(self, adapter: str, how: int) -> int | None:
        """A locked file; None where it is not to be had at once and `how` does not wait."""
        while True:
            lock = os.open(self._lock_path(adapter), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, how)
            except BlockingIOError:
                os.close(lock)
                return None
            if self._is(lock, adapter):
                return lock
            os.close(lock)  # it was removed while we waited for it

    def _is(self, lock: int, adapter: str) -> bool:
        """Whether it still is the file of that name."""
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self._lock_path(adapter)))
        except FileNotFoundError:
            return False

    def _lock_path(self, adapter: str) -> Path:
        return self._folder / f"{adapter}.lock"

    def _manifest_path(self, adapter: str) -> Path:
        return self._folder / f"{adapter}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
