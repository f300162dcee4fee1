"""A local folder in the storage: its files under a prefix, and beside them, written last, a
manifest that tells their sizes and SHA-256. Without its manifest it is not there. Blocking."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llm_engine.errors import LLMEngineError
from llm_engine.storage.base import CHUNK, NoSuchObject, Storage, is_key

MANIFEST = "manifest.json"
_LONGEST_MANIFEST = 16 * 2**20


class FolderBroken(LLMEngineError):
    """What is stored is not what its manifest tells of."""


@dataclass(frozen=True, slots=True)
class File:
    """`name`: its path within the folder."""

    name: str
    bytes: int
    sha256: str


def names_in(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def put(
    storage: Storage,
    prefix: str,
    folder: Path,
    names: Iterable[str],
    about: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """`about`: what the manifest tells besides. `check` raises where it must not come about.
    Raises StorageUnavailable, and OSError where the folder cannot be read."""
    files = [_put_file(storage, f"{prefix}/{name}", folder / name, name) for name in names]
    told = about | {
        "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in files]
    }
    data = orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    check()
    storage.put(f"{prefix}/{MANIFEST}", data)


def manifest(storage: Storage, prefix: str) -> dict[str, Any]:
    """Raises NoSuchObject, FolderBroken, StorageUnavailable."""
    data = b"".join(storage.read(f"{prefix}/{MANIFEST}", 0, _LONGEST_MANIFEST))
    try:
        told = orjson.loads(data)
        files_of(told)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise FolderBroken(f"{prefix}/{MANIFEST} cannot be read: {error!r}") from None
    return told


def files_of(told: dict[str, Any]) -> tuple[File, ...]:
    """Of a manifest. Raises KeyError, TypeError, ValueError."""
    files = tuple(File(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in told["files"])
    for file in files:
        if not is_key(file.name):
            raise ValueError(f"{file.name!r} is no name of a file")
    return files


def get(storage: Storage, prefix: str, files: Sequence[File], folder: Path) -> None:
    """All of it in place at once; a folder that is there already stays as it is.

    Raises NoSuchObject where it has been deleted meanwhile, FolderBroken, StorageUnavailable, and
    OSError where there is no room.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    unfinished.mkdir(mode=0o700)
    try:
        for file in files:
            _get_file(storage, prefix, file, unfinished / file.name)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def drop(storage: Storage, prefix: str) -> None:
    """Also where there is nothing. The manifest goes first: what is left of it is not there."""
    storage.delete(f"{prefix}/{MANIFEST}")
    for each in storage.list(f"{prefix}/"):
        storage.delete(each.key)


def _put_file(storage: Storage, key: str, path: Path, name: str) -> File:
    digest = hashlib.sha256()
    with storage.writer(key) as writer:
        for piece in _pieces(path):
            digest.update(piece)
            writer.write(piece)
    return File(name, writer.bytes, digest.hexdigest())


def _get_file(storage: Storage, prefix: str, file: File, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as target:
            for piece in storage.read(f"{prefix}/{file.name}"):
                size += len(piece)
                if size > file.bytes:
                    break  # it is not the file that the manifest means, however long
                digest.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
    except NoSuchObject:
        if storage.stat(f"{prefix}/{MANIFEST}") is None:
            raise  # somebody deletes it just now
        raise FolderBroken(f"{prefix}/{file.name} is missing") from None
    if size != file.bytes or digest.hexdigest() != file.sha256:
        with contextlib.suppress(OSError):
            path.unlink()
        raise FolderBroken(f"{prefix}/{file.name} is damaged: its bytes are not those once written")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while piece := source.read(CHUNK):
            yield piece
