"""The storage seam: whole objects under keys, written once and read in pieces.

A key is a relative path of plain names: "files/file-0198c0ffee", "batches/batch_01/parts/00007".
`is_key` says which ones there are. A key is never the beginning of another one's path: where "a"
is, "a/b" is not (a folder could not hold both).

An object is there with all of its bytes or not at all: what is being written is invisible until its
writer has ended well, and replaces what was there before in one step. Nothing is appended to.

All methods block and may be called from any thread. They raise StorageUnavailable when the bytes
cannot be reached, or there is no room for more, after the retries that the backend does by itself.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from llm_engine.errors import LLMEngineError

CHUNK = 2**20  # bytes; the largest piece that `read` gives

#: Bytes; less than what S3 takes (1024), so that there is room for a prefix.
_LONGEST_KEY, _LONGEST_NAME = 900, 255
#: A folder keeps in the last one what is being written.
UNFINISHED = ".unfinished"
_NO_NAMES = ("", ".", "..", UNFINISHED)
_UNFIT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def is_key(text: str) -> bool:
    """Whether it means the same, and nothing else, to every file system and to S3."""
    if _UNFIT.search(text) or len(text.encode()) > _LONGEST_KEY:
        return False
    return all(
        name not in _NO_NAMES and len(name.encode()) <= _LONGEST_NAME for name in text.split("/")
    )


class NoSuchObject(LLMEngineError):
    """There is nothing under that key."""


@dataclass(frozen=True, slots=True)
class Stored:
    key: str
    bytes: int
    modified_at: float  # unix seconds


class Writer(AbstractContextManager["Writer"]):
    """`with storage.writer(key) as writer: writer.write(data)`; an exception leaves nothing."""

    bytes: int = 0  # written so far

    @abstractmethod
    def write(self, data: bytes) -> None: ...


class Storage(ABC):
    @property
    @abstractmethod
    def shown(self) -> str:
        """Where it is, for people: no secrets."""

    @abstractmethod
    def writer(self, key: str) -> Writer:
        """For bytes of any number, with flat memory."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Only where there is nothing yet; False where there is. Of many at once, one wins."""

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Bytes [start, start + length) in pieces of at most CHUNK. Raises NoSuchObject at once,
        not at the first piece. A range past the end is cut; one that begins there is empty."""

    @abstractmethod
    def stat(self, key: str) -> Stored | None: ...

    @abstractmethod
    def delete(self, key: str) -> None:
        """Also where there is nothing."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Stored]:
        """All whose key begins with it, sorted by key."""

    @abstractmethod
    def link(self, key: str, seconds: int, filename: str) -> str | None:
        """A URL that needs no key of ours and ends by itself; None where it has none to give."""

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError where it can never work, StorageUnavailable where it does not now."""

    @abstractmethod
    def close(self) -> None:
        """Ends idle connections."""
