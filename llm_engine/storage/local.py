"""Objects as files in a folder: of this machine, or of a file system that all nodes share."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from llm_engine.errors import ConfigError, StorageUnavailable
from llm_engine.storage.base import CHUNK, NoSuchObject, Storage, Stored, Writer

#: Half-written objects lie here, on the same file system, so that a rename puts them in place.
_UNFINISHED = ".unfinished"


class LocalStorage(Storage):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def shown(self) -> str:
        return str(self._folder)

    def writer(self, key: str) -> Writer:
        return _FileWriter(self._folder, self._path(key))

    def put(self, key: str, data: bytes) -> None:
        with self.writer(key) as writer:
            writer.write(data)

    def create(self, key: str, data: bytes) -> bool:
        writer = _FileWriter(self._folder, self._path(key), replace=False)
        with writer:
            writer.write(data)
        return writer.placed

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with _in_words(self._folder, key):
            file = self._path(key).open("rb")
        return self._pieces(file, start, length)

    def stat(self, key: str) -> Stored | None:
        with contextlib.suppress(NoSuchObject), _in_words(self._folder, key):
            found = self._path(key).stat()
            return Stored(key, found.st_size, found.st_mtime)
        return None

    def delete(self, key: str) -> None:
        with contextlib.suppress(NoSuchObject), _in_words(self._folder, key):
            path = self._path(key)
            path.unlink()
            for parent in path.parents:
                if parent == self._folder:
                    break
                with contextlib.suppress(OSError):  # not empty
                    parent.rmdir()

    def list(self, prefix: str) -> Iterator[Stored]:
        with _in_words(self._folder, prefix):
            keys = sorted(
                path.relative_to(self._folder).as_posix()
                for path in self._folder.rglob("*")
                if path.is_file() and _UNFINISHED not in path.parts
            )
        for key in keys:
            if key.startswith(prefix) and (found := self.stat(key)) is not None:
                yield found

    def link(self, key: str, seconds: int, filename: str) -> str | None:
        return None

    def check(self) -> None:
        try:
            (self._folder / _UNFINISHED).mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self._folder / _UNFINISHED):
                pass
        except OSError as error:
            raise ConfigError(
                f"storage.url: {self._folder} cannot be written: {error.strerror}"
            ) from None

    def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        assert all(part not in ("", ".", "..", _UNFINISHED) for part in parts), key
        return self._folder.joinpath(*parts)

    def _pieces(self, file: IO[bytes], start: int, length: int | None) -> Iterator[bytes]:
        with file, _in_words(self._folder, file.name):
            file.seek(start)
            left = length
            while left is None or left > 0:
                piece = file.read(CHUNK if left is None else min(CHUNK, left))
                if not piece:
                    return
                if left is not None:
                    left -= len(piece)
                yield piece


class _FileWriter(Writer):
    def __init__(self, folder: Path, target: Path, replace: bool = True) -> None:
        self._folder = folder
        self._target = target
        self._replace = replace
        self._file: IO[bytes] | None = None
        self.bytes = 0
        self.placed = False

    def __enter__(self) -> "_FileWriter":
        with _in_words(self._folder, self._target.name):
            unfinished = self._folder / _UNFINISHED
            unfinished.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = tempfile.NamedTemporaryFile(dir=unfinished, delete=False)
        return self

    def write(self, data: bytes) -> None:
        assert self._file is not None
        with _in_words(self._folder, self._target.name):
            self._file.write(data)
            self.bytes += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        unfinished = Path(self._file.name)
        try:
            with _in_words(self._folder, self._target.name), self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._place(unfinished)
        finally:
            unfinished.unlink(missing_ok=True)

    def _place(self, unfinished: Path) -> None:
        while True:
            self._target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                if self._replace:
                    unfinished.replace(self._target)
                else:
                    os.link(unfinished, self._target)
            except FileExistsError:
                return
            except FileNotFoundError:
                continue  # somebody deleted the last object of that folder, and it with it
            break
        self.placed = True
        handle = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the name, too, survives a power cut
        finally:
            os.close(handle)


@contextlib.contextmanager
def _in_words(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NoSuchObject(f"there is no {key} in {folder}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageUnavailable(
            f"The storage is full: {folder} has no room left. Operators: make room, or set "
            "storage.url to a larger place."
            if full
            else f"The storage cannot be used now: {error.strerror} ({folder}).",
            code="storage_full" if full else None,
        ) from error
