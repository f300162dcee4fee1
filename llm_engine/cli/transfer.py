"""Bytes up to a gateway and down from it, with flat memory, and a meter that shows how they move.

Small files go up in one request, large ones in parts, some at a time. Nothing is resumed: what is
cut off leaves nothing here, and the gateway forgets its half by itself.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from uuid import uuid4

from llm_engine.cli import console
from llm_engine.cli.client import READ_TIMEOUT_S, Gateway, Unreachable, item_path
from llm_engine.errors import LLMEngineError

LARGEST_WHOLE = 512 * 2**20  # bytes of a file that goes up in one request
PART = 64 * 2**20  # bytes
PARTS_AT_A_TIME = 4
RETRY_AFTER_S = (1, 2, 4, 8)  # as long as a gateway takes to restart
LINE_PERIOD_S = 5.0  # between two lines where nothing can be redrawn
CHUNK = 2**20
STDOUT = "-"
Row = dict[str, Any]


class Stopped(LLMEngineError):
    """Another part has failed, or Ctrl-C was pressed."""


# -- up


def upload(gateway: Gateway, path: Path, purpose: str, expires_s: int | None = None) -> Row:
    """A local file becomes one of the gateway's. Raises before anything is sent if it can."""
    with _in_words(path):
        if not path.is_file():
            raise LLMEngineError(f"{path} is not a file." if path.exists() else f"no file {path}.")
        size = path.stat().st_size
    gateway.get("/v1/files?limit=1")  # a wrong key is told before many bytes are sent
    with Meter(path.name, size) as meter:
        sending = _Sending(gateway, path, size, purpose, expires_s, meter)
        return sending.whole() if size <= LARGEST_WHOLE else sending.in_parts()


@dataclass(slots=True)
class _Sending:
    """One file on its way up. What the gateway could not answer is sent again, a few times."""

    gateway: Gateway
    path: Path
    size: int
    purpose: str
    expires_s: int | None
    meter: "Meter"
    stop: threading.Event = field(default_factory=threading.Event)
    once: str = field(default_factory=lambda: uuid4().hex)

    def whole(self) -> Row:
        expiry = {f"expires_after[{key}]": str(value) for key, value in self._expiry().items()}
        fields = {"purpose": self.purpose} | expiry
        return self._send("/v1/files", "file", 0, self.size, fields)

    def in_parts(self) -> Row:
        upload = self.gateway.send("POST", "/v1/uploads", self._declared())["id"]
        try:
            done = self._parts(upload)
            complete = item_path("uploads", upload, "/complete")
            long = READ_TIMEOUT_S  # it puts the parts together
            return self._again(lambda: self.gateway.send("POST", complete, done, long))["file"]
        except BaseException:
            with contextlib.suppress(LLMEngineError):
                self.gateway.send("POST", item_path("uploads", upload, "/cancel"))
            raise

    def _parts(self, upload: str) -> Row:
        """What completes the upload."""
        path = item_path("uploads", upload, "/parts")

        def send(start: int) -> str:
            return self._send(path, "data", start, min(PART, self.size - start), {})["id"]

        with ThreadPoolExecutor(PARTS_AT_A_TIME + 1) as pool:
            try:
                digest = pool.submit(self._md5)
                parts = list(pool.map(send, range(0, self.size, PART)))
                return {"part_ids": parts, "md5": digest.result()}
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, path: str, name: str, start: int, length: int, fields: Row) -> Row:
        once = f"{self.once}-{start}"

        def send() -> Row:
            moved = Tally(self.meter.add)
            try:
                with Span(self.path, start, length, moved.add, self.stop) as span:
                    return self.gateway.upload(path, name, self.path.name, span, once, **fields)
            except BaseException:
                moved.undo()
                raise

        return self._again(send)

    def _again(self, send: Callable[[], Row]) -> Row:
        for wait_s in RETRY_AFTER_S:
            try:
                return send()
            except Unreachable as error:
                self.meter.note(f"{error} Trying again.")
                self.stop.wait(wait_s)
        return send()

    def _declared(self) -> Row:
        jsonl = self.path.suffix.lower() == ".jsonl"
        expiry = self._expiry()
        return {
            "filename": self.path.name,
            "purpose": self.purpose,
            "bytes": self.size,
            "mime_type": "application/jsonl" if jsonl else "application/octet-stream",
        } | ({"expires_after": expiry} if expiry else {})

    def _expiry(self) -> Row:
        if self.expires_s is None:
            return {}
        return {"anchor": "created_at", "seconds": self.expires_s}

    def _md5(self) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        with _in_words(self.path), self.path.open("rb") as file:
            while (piece := file.read(CHUNK)) and not self.stop.is_set():
                digest.update(piece)
        return digest.hexdigest()


class Span:
    """Bytes [start, start + length) of a file, as a file of its own; `moved` hears how many go."""

    def __init__(
        self,
        path: Path,
        start: int,
        length: int,
        moved: Callable[[int], None],
        stop: threading.Event | None = None,
    ) -> None:
        self._path, self._start, self._length = path, start, length
        self._moved, self._stop = moved, stop
        self._at = 0
        with _in_words(path):
            self._file: IO[bytes] = path.open("rb")
        self._file.seek(start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        if self._stop is not None and self._stop.is_set():
            raise Stopped("the upload was stopped.")
        left = self._length - self._at
        with _in_words(self._path):
            data = self._file.read(left if size < 0 else min(size, left))
        if left and not data:
            raise LLMEngineError(f"{self._path} became shorter while it was read.")
        self._at += len(data)
        self._moved(len(data))
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        self._file.seek(self._start + self._at)
        return self._at

    def tell(self) -> int:
        return self._at


class Tally:
    """What of one try has been counted, so that it can be taken back."""

    def __init__(self, add: Callable[[int], None]) -> None:
        self._add, self._bytes = add, 0

    def add(self, count: int) -> None:
        self._bytes += count
        self._add(count)

    def undo(self) -> None:
        self._add(-self._bytes)


# -- down


def place(given: str | None, filename: str, *, force: bool) -> str:
    """Where a download goes: STDOUT or a path. Raises before a byte is asked for if it can't.

    `given`: a file, a folder for `filename`, STDOUT, or None for `filename` right here.
    """
    if given == STDOUT:
        return given
    name = console.plain(Path(filename).name).lstrip(".") or "download"
    path = Path(given) if given is not None else Path(name)
    if path.is_dir() or (given or "").endswith("/"):
        path = path / name
    if path.exists() and not force:
        raise LLMEngineError(f"{path} exists already: --force replaces it, -o names another.")
    if not path.parent.is_dir():
        raise LLMEngineError(f"there is no folder {path.parent}.")
    return str(path)


def download(gateway: Gateway, file: Row, target: str) -> None:
    """`file`: its record. Whole and under its name, or not there at all."""
    name = "stdout" if target == STDOUT else Path(target).name
    with (
        gateway.download(item_path("files", file["id"], "/content")) as pieces,
        Meter(name, file["bytes"]) as meter,
    ):
        if target == STDOUT:
            return _pour(pieces, sys.stdout.buffer, meter)
        with _whole_file(Path(target)) as out:
            _pour(pieces, out, meter)


def _pour(pieces: Iterator[bytes], out: IO[bytes], meter: "Meter") -> None:
    for piece in pieces:
        out.write(piece)
        meter.add(len(piece))
    out.flush()


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    with _in_words(path):
        out = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    try:
        with _in_words(path), out:
            yield out
        with _in_words(path):
            Path(out.name).chmod(0o666 & ~_umask())
            os.replace(out.name, path)
    finally:
        Path(out.name).unlink(missing_ok=True)


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LLMEngineError(f"{path}: {error.strerror or error}.") from None


# -- shown


class Meter:
    """Bytes that move: a bar in a terminal, elsewhere a line every few seconds. On stderr."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = console.plain(name), total
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._told_at = time.monotonic()
        self._out = console.console(stderr=True)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._out.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=30),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(compact=True),
                console=self._out,
                transient=True,
            )
            self._task = self._bar.add_task(self._name, total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int) -> None:
        """From any thread."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            tell = self._bar is None and now - self._told_at >= LINE_PERIOD_S
            if tell:
                self._told_at = now
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif tell:
            self._out.print(self._line(now), soft_wrap=True)

    def note(self, text: str) -> None:
        self._out.print(console.plain(text), soft_wrap=True)

    def _line(self, now: float) -> str:
        speed = console.bytes_(int(self._done / max(now - self._began, 1e-3)))
        return (
            f"{self._name}: {console.bytes_(self._done)} of {console.bytes_(self._total)}, "
            f"{speed}/s"
        )
