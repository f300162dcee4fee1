"""What an answer means for its row, and the line of results it becomes. Pure."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from llm_engine.batches.gateways import Answer
from llm_engine.batches.rows import row_id
from llm_engine.errors import UpstreamAway
from llm_engine.records import Usage

EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


_NO_TOKENS = Usage()


class Verdict(StrEnum):
    DONE = "done"
    REFUSED = "refused"  # the row itself is wrong: asking again changes nothing
    FAILED = "failed"  # the row may be why; it is tried a few times
    BUSY = "busy"  # the model takes no more now: not the row's fault
    AWAY = "away"  # nobody can answer now: no row's fault
    STRANGER = "stranger"  # our ticket was refused


@dataclass(frozen=True, slots=True)
class Finished:
    """A row's end."""

    row: int
    line: bytes  # of the output or error file, with its newline
    failed: bool
    usage: Usage = _NO_TOKENS


def judge(answer: Answer) -> tuple[Verdict, Any]:
    """And its body as data; None where that is no JSON object."""
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        body = None
    status = answer.status
    if status == 200:
        return (Verdict.FAILED if body is None else Verdict.DONE), body
    if status == 429:
        return Verdict.BUSY, body
    # A load balancer in front of gateways that are being restarted has words of its own.
    if status == 503 or (status == 404 and body is None):
        return Verdict.AWAY, body
    if status in (502, 504) and _object(body or {}, "error").get("code") == UpstreamAway.code:
        return Verdict.AWAY, body
    if status == 401:
        return Verdict.STRANGER, body
    if status == 408 or status >= 500 or body is None:
        return Verdict.FAILED, body
    return Verdict.REFUSED, body


def result(
    batch: str, row: int, custom_id: str | None, answer: Answer, body: Any, model: str | None
) -> Finished:
    """A row that was answered. `model`: what the answer shall call it, if not as it does."""
    ok = answer.status == 200
    shown: Any = body
    if body is None:
        text = answer.body[:1000].decode("utf-8", "replace")
        shown = {"error": {"message": text, "type": "server_error", "param": None, "code": None}}
    elif ok and model is not None and "model" in body:
        shown = body | {"model": model}
    elif b"\n" not in answer.body:
        shown = orjson.Fragment(answer.body)  # as it came: nothing to take apart and put together
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": shown}
    usage = usage_of(body) if ok else _NO_TOKENS
    return Finished(row, _line(batch, row, custom_id, response, None), not ok, usage)


def failure(batch: str, row: int, custom_id: str | None, code: str, message: str) -> Finished:
    """A row without an answer."""
    error = {"code": code, "message": message}
    return Finished(row, _line(batch, row, custom_id, None, error), True)


def usage_of(body: dict[str, Any]) -> Usage:
    """Of an answer of any endpoint; zeros where it tells none."""
    told = _object(body, "usage")
    prompt = _object(told, "prompt_tokens_details", "input_tokens_details")
    completion = _object(told, "completion_tokens_details", "output_tokens_details")
    return Usage(
        _number(told, "prompt_tokens", "input_tokens"),
        _number(prompt, "cached_tokens"),
        _number(told, "completion_tokens", "output_tokens"),
        _number(completion, "reasoning_tokens"),
    )


def _line(batch: str, row: int, custom_id: str | None, response: Any, error: Any) -> bytes:
    line = {
        "id": row_id(batch, row),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _object(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return next((data[name] for name in names if isinstance(data.get(name), dict)), {})


def _number(data: dict[str, Any], *names: str) -> int:
    return next((data[name] for name in names if isinstance(data.get(name), int)), 0)
