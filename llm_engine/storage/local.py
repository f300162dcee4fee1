"""Objects as files in a folder: of this machine, or of a file system that all nodes share.

A person finds them under their keys. What is being written lies beside them, in `.unfinished`, and
moves to its place in one step; what a process that was killed has left there goes at `check`.
"""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from llm_engine.errors import ConfigError, StorageUnavailable
from llm_engine.storage.base import (
    CHUNK,
    UNFINISHED,
    NoSuchObject,
    Storage,
    Stored,
    Writer,
    is_key,
)

#: No room: of the disk, of the owner's quota, of the largest file that the process may write.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING = {*_FULL, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
#: Nothing is written for so long without a byte.
_LEFT_OVER_S = 86400
#: Of a folder that somebody else removes each time it is made, because it is empty.
_PLACINGS = 100


class LocalStorage(Storage):
    def __init__(self, folder: Path, *, private: bool = True) -> None:
        """`private`: what is made can be read by nobody but the user whom the process runs as."""
        self._folder = folder
        self._private = private

    @property
    def shown(self) -> str:
        return str(self._folder)

    def writer(self, key: str) -> Writer:
        return _FileWriter(self._folder, self._path(key), self._private)

    def put(self, key: str, data: bytes) -> None:
        with self.writer(key) as writer:
            writer.write(data)

    def create(self, key: str, data: bytes) -> bool:
        """By a hard link, which the file system must have."""
        writer = _FileWriter(self._folder, self._path(key), self._private, replace=False)
        with writer:
            writer.write(data)
        return writer.placed

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        pieces = self._pieces(key, start, length)
        next(pieces)
        return pieces

    def stat(self, key: str) -> Stored | None:
        path = self._path(key)
        with contextlib.suppress(NoSuchObject), _reading(self._folder, key):
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                return Stored(key, found.st_size, found.st_mtime)
        return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(NoSuchObject), _reading(self._folder, key):
            path.unlink()
            for parent in path.parents:
                if parent == self._folder:
                    break
                with contextlib.suppress(OSError):  # not empty
                    parent.rmdir()

    def list(self, prefix: str) -> Iterator[Stored]:
        for key in sorted(self._keys(prefix)):
            if (found := self.stat(key)) is not None:
                yield found

    def link(self, key: str, seconds: int, filename: str) -> str | None:
        return None

    def check(self) -> None:
        unfinished = self._folder / UNFINISHED
        try:
            _make_folder(unfinished, self._private)
            with tempfile.TemporaryFile(dir=unfinished) as probe:
                probe.write(b"-")
            for left in unfinished.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if left.stat().st_mtime < time.time() - _LEFT_OVER_S:
                        left.unlink()
        except OSError as error:
            if error.errno in _PASSING:
                raise _unavailable(self._folder, error) from error
            raise ConfigError(
                f"storage.url: {self._folder} cannot be written: {error.strerror}"
            ) from None

    def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        if not is_key(key):
            raise ValueError(f"no key of a storage: {key!r}")
        return self._folder.joinpath(*key.split("/"))

    def _keys(self, prefix: str) -> Iterator[str]:
        within = prefix.rpartition("/")[0]  # what lies elsewhere need not be walked through
        top = self._path(within) if within else self._folder
        with _reading(self._folder, prefix):
            for folder, folders, names in os.walk(top, onerror=_unless_gone):
                if Path(folder) == self._folder and UNFINISHED in folders:
                    folders.remove(UNFINISHED)
                for name in names:
                    key = Path(folder, name).relative_to(self._folder).as_posix()
                    if key.startswith(prefix) and is_key(key):
                        yield key

    def _pieces(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        """Opens at the first `next`, which gives nothing: a reader who stops there closes it."""
        with _reading(self._folder, key), self._path(key).open("rb") as file:
            yield b""
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
    def __init__(self, folder: Path, target: Path, private: bool, replace: bool = True) -> None:
        self._folder = folder
        self._target = target
        self._private = private
        self._replace = replace
        self.bytes = 0
        self.placed = False

    def __enter__(self) -> "_FileWriter":
        with _writing(self._folder):
            unfinished = self._folder / UNFINISHED
            _make_folder(unfinished, self._private)
            self._path = unfinished / secrets.token_hex(16)
            mode = 0o600 if self._private else 0o666
            made = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            self._file: BinaryIO = open(made, "wb")
        return self

    def write(self, data: bytes) -> None:
        with _writing(self._folder):
            self._file.write(data)
            self.bytes += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with _writing(self._folder), self._file:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._place()
            else:
                with contextlib.suppress(OSError):  # what it still holds finds no room either
                    self._file.close()
        finally:
            self._path.unlink(missing_ok=True)

    def _place(self) -> None:
        for left in reversed(range(_PLACINGS)):
            try:
                _make_folder(self._target.parent, self._private)
                if self._replace:
                    self._path.replace(self._target)
                else:
                    os.link(self._path, self._target)
                break
            except FileExistsError:
                if self._target.exists():
                    return
                if not left:
                    raise
            except FileNotFoundError:
                # Somebody deleted the last object of that folder, and it with it.
                if not left:
                    raise
        self.placed = True
        handle = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the name, too, survives a power cut
        finally:
            os.close(handle)


def _make_folder(folder: Path, private: bool) -> None:
    if not folder.is_dir():
        if not folder.parent.exists():
            _make_folder(folder.parent, private)  # `parents=True` would let everybody in there
        folder.mkdir(exist_ok=True, mode=0o700 if private else 0o777)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _reading(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NoSuchObject(f"There is no {key} in {folder}.") from None
    except OSError as error:
        raise _unavailable(folder, error) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unavailable(folder, error) from error


def _unavailable(folder: Path, error: OSError) -> StorageUnavailable:
    if error.errno in _FULL:
        return StorageUnavailable(
            f"The storage is full: {folder} has no room left. Operators: make room, or set "
            "storage.url to a larger place.",
            code="storage_full",
        )
    return StorageUnavailable(f"The storage cannot be used now: {error.strerror} ({folder}).")
