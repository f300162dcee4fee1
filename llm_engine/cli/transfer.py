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
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from llm_engine.cli import console
from llm_engine.cli.client import Gateway, Unreachable, item_path
from llm_engine.errors import LLMEngineError

LARGEST_WHOLE = 512 * 2**20  # bytes of a file that goes up in one request
PART = 64 * 2**20  # bytes
PARTS_AT_A_TIME = 4
PART_TRIES = 5
RETRY_AFTER_S = 1.0  # twice as long each time
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
        send = _send_whole if size <= LARGEST_WHOLE else _send_parts
        return send(gateway, path, size, purpose, expires_s, meter)


def _send_whole(
    gateway: Gateway, path: Path, size: int, purpose: str, expires_s: int | None, meter: "Meter"
) -> Row:
    expiry = _expiry(expires_s)
    with Span(path, 0, size, meter.add) as file:
        return gateway.upload(
            "/v1/files",
            "file",
            path.name,
            file,
            purpose=purpose,
            **{f"expires_after[{key}]": str(value) for key, value in expiry.items()},
        )


def _send_parts(
    gateway: Gateway, path: Path, size: int, purpose: str, expires_s: int | None, meter: "Meter"
) -> Row:
    wanted: Row = {
        "filename": path.name,
        "purpose": purpose,
        "bytes": size,
        "mime_type": "application/jsonl" if path.suffix == ".jsonl" else "application/octet-stream",
    }
    if expires_s is not None:
        wanted["expires_after"] = _expiry(expires_s)
    upload = gateway.send("POST", "/v1/uploads", wanted)["id"]
    stop = threading.Event()

    def send_part(start: int) -> str:
        for again in range(PART_TRIES):
            moved = Tally(meter.add)
            try:
                with Span(path, start, min(PART, size - start), moved.add, stop) as part:
                    return gateway.upload(
                        item_path("uploads", upload, "/parts"), "data", path.name, part
                    )["id"]
            except Unreachable:
                if again == PART_TRIES - 1:
                    raise
                moved.undo()
                stop.wait(RETRY_AFTER_S * 2**again)
        raise AssertionError

    try:
        with ThreadPoolExecutor(PARTS_AT_A_TIME + 1) as pool:
            try:
                digest = pool.submit(_md5, path, stop)
                parts = list(pool.map(send_part, range(0, size, PART)))
                done = {"part_ids": parts, "md5": digest.result()}
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return gateway.send("POST", item_path("uploads", upload, "/complete"), done)["file"]
    except BaseException:
        with contextlib.suppress(LLMEngineError):
            gateway.send("POST", item_path("uploads", upload, "/cancel"))
        raise


def _expiry(expires_s: int | None) -> Row:
    return {} if expires_s is None else {"anchor": "created_at", "seconds": expires_s}


def _md5(path: Path, stop: threading.Event) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with _in_words(path), path.open("rb") as file:
        while (piece := file.read(CHUNK)) and not stop.is_set():
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

    def _line(self, now: float) -> str:
        speed = console.bytes_(int(self._done / max(now - self._began, 1e-3)))
        return (
            f"{self._name}: {console.bytes_(self._done)} of {console.bytes_(self._total)}, "
            f"{speed}/s"
        )
