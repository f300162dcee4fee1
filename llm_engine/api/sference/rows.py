"""Batches and their results as sference's clients read them. No I/O.

They know five status words and one window, and refuse a whole list for any other.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import orjson

from llm_engine.records import BatchRecord
from llm_engine.statuses import BatchState

Row = dict[str, Any]

WINDOW = "24h"
#: In BatchOptions.extras: how many rows there are, until its job has counted them.
COUNT = "request_count"

_STATUS = {
    BatchState.VALIDATING: "pending",
    BatchState.IN_PROGRESS: "running",
    BatchState.FINALIZING: "running",
    BatchState.CANCELLING: "running",  # until it is drained: their wait ends at `cancelled`
    BatchState.COMPLETED: "completed",
    BatchState.FAILED: "failed",
    BatchState.EXPIRED: "failed",
    BatchState.CANCELLED: "cancelled",
}


def status(record: BatchRecord) -> str:
    return _STATUS[record.state]


def batch_row(record: BatchRecord) -> Row:
    """The client's fields, and from `model` on ours, which it leaves aside."""
    usage = record.usage
    return {
        "id": record.id,
        "status": status(record),
        "window": WINDOW,
        "request_count": record.total or record.options.extras.get(COUNT, 0),
        "created_at": iso(record.created_at),
        "updated_at": iso(max([record.created_at, *record.times.values()])),
        "completed_at": ended(record),
        "total_prompt_tokens": usage.prompt_tokens,
        "total_completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "model": record.model,
        "completed_count": record.completed,
        "failed_count": record.failed,
        "expires_at": iso(record.expires_at),
        "error": error(record),
    }


def ended(record: BatchRecord) -> str | None:
    """When it came to its end, whichever."""
    return iso(record.times[record.state]) if record.state.is_final else None


def error(record: BatchRecord) -> Row | None:
    """Why it failed. `errors` are of its input, each with its line."""
    if status(record) != "failed":
        return None
    expired = "The batch did not end within its window; what was finished is in the results."
    first = record.errors[0]["message"] if record.errors else None
    default = expired if record.state is BatchState.EXPIRED else "The batch could not run."
    return {"message": record.reason or first or default, "errors": record.errors}


def result_row(line: bytes) -> Row:
    """A line of results in OpenAI's form."""
    told = orjson.loads(line)
    failure, response = told.get("error"), told.get("response")
    body = response["body"] if response else None
    if response and response["status_code"] == 200 and not failure:
        return _result(told, "completed", result=body)
    return _result(told, "failed", error=failure or body.get("error") or body)


def as_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """As JSON lines, in pieces worth a write."""
    return _gathered(
        orjson.dumps(result_row(line), option=orjson.OPT_APPEND_NEWLINE) for line in lines
    )


def as_object(head: Row, lines: Iterable[bytes]) -> Iterator[bytes]:
    """`head` as a JSON object with one more field, `results`: the rows."""
    return _gathered(_object(head, lines))


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _result(told: Row, word: str, result: Any = None, error: Any = None) -> Row:
    return {
        "custom_id": told["custom_id"],
        "status": word,
        "result_json": result,
        "error_json": error,
    }


def _object(head: Row, lines: Iterable[bytes]) -> Iterator[bytes]:
    yield orjson.dumps(head)[:-1] + b',"results":['
    separator = b""
    for line in lines:
        yield separator + orjson.dumps(result_row(line))
        separator = b","
    yield b"]}"


def _gathered(pieces: Iterable[bytes], size: int = 2**16) -> Iterator[bytes]:
    held, bytes_held = [], 0
    for piece in pieces:
        held.append(piece)
        bytes_held += len(piece)
        if bytes_held >= size:
            yield b"".join(held)
            held, bytes_held = [], 0
    yield b"".join(held)
