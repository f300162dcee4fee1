"""Batches whose requests lie under a path, or whose results go to one: Scale's, in its forms."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import orjson

from llm_engine.api.llm_engine_api import batch_rows
from llm_engine.batches.lease import Lease
from llm_engine.batches.results import Spool, write
from llm_engine.batches.rows import split_lines
from llm_engine.batches.validation import Problem, problem
from llm_engine.config import Settings
from llm_engine.errors import APIError, InvalidRequest, NotFound, StorageUnavailable
from llm_engine.files import BATCH, key_of, new_record
from llm_engine.nesting import MOST_VALUES, TooMuch, watched
from llm_engine.patience import patiently
from llm_engine.records import BatchRecord
from llm_engine.storage.base import NoSuchObject, Storage
from llm_engine.storage.opening import open_path
from llm_engine.store.sql import Store

#: A path that a client has named may never work: it gets less patience than what is ours.
OUTPUT_PATIENCE_S = 60.0
#: Nobody knows the file's id, so nobody will delete it.
INPUT_EXPIRES_S = 30 * 86400
_INPUT, _OUTPUT = "input_data_path", "output_data_path"


async def bring(settings: Settings, store: Store, storage: Storage, lease: Lease) -> Problem | None:
    """Its requests, put into an input file like every other batch's; once.

    What is wrong with them, where they cannot be read.
    """
    record = lease.record
    try:
        await patiently(store.files.get, record.input_file_id)
        return None  # a former job has done it
    except NotFound:
        pass
    try:
        await _bring(settings, store, storage, lease)
    except NoSuchObject:
        return problem(
            "invalid_request", f"There is nothing at '{record.options.input_path}'.", _INPUT
        )
    except (StorageUnavailable, InvalidRequest) as error:
        return problem(error.code or "invalid_request", error.message, error.param or _INPUT)
    return None


async def deliver(
    settings: Settings, storage: Storage, record: BatchRecord, spool: Spool
) -> Problem | None:
    """The results as one JSON array at the path that the client has named; why not, if not."""
    path = record.options.output_path
    assert path is not None

    def deliver() -> None:
        target, key = open_path(settings, path, owner=record.owner, param=_OUTPUT)
        write(target, key, array_of(record, spool), lambda: None)

    try:
        await patiently(deliver, patience_s=OUTPUT_PATIENCE_S)
    except APIError as error:
        message = f"The results could not be written to '{path}': {error.message}"
        return problem("output_path_unwritable", message, _OUTPUT)
    return None


def array_of(record: BatchRecord, spool: Spool) -> Iterator[bytes]:
    """The pieces of a JSON array, one element a row."""
    form = record.options.output_form or batch_rows.V2
    yield b"["
    for place, line in enumerate(spool.lines()):
        yield b",\n" if place else b"\n"
        yield orjson.dumps(batch_rows.element(orjson.loads(line), form))
    yield b"\n]\n"


def lines_of(record: BatchRecord, items: Iterable[Any]) -> Iterator[bytes]:
    """Of an input file. Raises InvalidRequest."""
    form = record.options.output_form or batch_rows.V2
    number = 0
    for place, item in enumerate(items):
        if isinstance(item, dict) and "prompts" in item:
            bodies = batch_rows.of_prompts(item, "input")
        else:
            bodies = iter([batch_rows.convert(item, form, f"input[{place}]")])
        for body in bodies:
            yield batch_rows.line(number, body, record.model or "")
            number += 1


async def _bring(settings: Settings, store: Store, storage: Storage, lease: Lease) -> None:
    record = lease.record
    path = record.options.input_path
    assert path is not None
    target = key_of(record.input_file_id)

    def copy() -> tuple[int, str | None]:
        """The bytes of the input file, and the endpoint of its first row."""
        source, key = open_path(settings, path, owner=record.owner, param=_INPUT)
        pieces = _at_most(source.read(key), settings.batches.max_file_bytes)
        # One more than allowed: validation tells that it is too many.
        lines = islice(lines_of(record, read_items(pieces)), settings.batches.max_rows + 1)
        first = next(lines, b"")
        size = write(storage, target, chain([first], lines), lease.check)
        return size, orjson.loads(first)["url"] if first else None

    size, endpoint = await patiently(copy)
    if endpoint is not None:
        await lease.note(endpoint=endpoint)  # nobody could know before
    file = new_record(
        record.input_file_id, record.owner, BATCH, "requests.jsonl", size, INPUT_EXPIRES_S
    )

    def keep() -> None:
        try:
            store.files.get(file.id)  # the first try has done it, unheard
        except NotFound:
            store.files.add(file)

    await patiently(keep)


def read_items(pieces: Iterable[bytes]) -> Iterator[Any]:
    """The items of a JSON array or of JSON lines; a file that is one object gives just that.

    Raises InvalidRequest.
    """
    import ijson

    pieces = iter(pieces)
    first = b""
    for piece in pieces:
        first = (first + piece).removeprefix(b"\xef\xbb\xbf").lstrip()
        if first:
            break
    pieces = chain([first], pieces)
    count = 0
    try:
        if first.startswith(b"["):
            items: Iterator[Any] = ijson.items(watched(_Reader(pieces), "item"), "item")
        else:
            items = _objects(pieces)
        for item in items:
            yield item
            count += 1
    except TooMuch as error:
        raise InvalidRequest(f"Invalid 'input[{count}]': {error}.", param=_INPUT) from None
    except (orjson.JSONDecodeError, ijson.JSONError) as error:
        raise _malformed(str(error)) from None


def _objects(pieces: Iterable[bytes]) -> Iterator[Any]:
    import ijson

    lines = (line for line in split_lines(pieces) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    try:
        yield _load(first)
    except (orjson.JSONDecodeError, ijson.JSONError):  # one object over several lines
        yield from ijson.items(watched(_Reader(chain([first], lines))), "")
    for line in lines:
        yield _load(line)


def _load(line: bytes) -> Any:
    """As fast as may be, where it has too few bytes to hold too many values."""
    import ijson

    if len(line) <= MOST_VALUES:
        return orjson.loads(line)
    (value,) = ijson.items(watched(_Reader([line])), "")
    return value


def _at_most(pieces: Iterable[bytes], most: int) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise InvalidRequest(
                f"The input has more than {most} bytes (batches.max_file_bytes).",
                param=_INPUT,
                code="file_too_large",
            )
        yield piece


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The input is neither a JSON array of objects nor JSON lines: {why[:200]}.",
        param=_INPUT,
        code="invalid_json",
    )


class _Reader:
    """Pieces as a file, for ijson."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")  # a piece may be long, and is not copied for each bit of it

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        taken, self._rest = self._rest[:size], self._rest[size:]
        return bytes(taken)
