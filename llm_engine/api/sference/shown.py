"""Responses, streams and events as sference's clients read them. No I/O.

Each of their lists is refused as a whole for one word that they do not know, and what an item of
output looks like has changed on the way: `legacy` is for sference-sdk 0.0.1 to 0.0.6.
"""

import re
from typing import Any

from llm_engine.api.responses.shown import show
from llm_engine.api.sference.rows import iso
from llm_engine.responses import FeedEntry, Item, ResponseRecord, Stream, StreamCounts
from llm_engine.statuses import ResponseState

Row = dict[str, Any]

_CURSOR = re.compile(r"cmpl_([0-9]{20})")
_FORMAT = "openai_summary"  # of reasoning: the word that every version knows
_FINISHED = {None: "stop", "content_filter": "content_filter"}  # else it was a limit of tokens


def status(record: ResponseRecord, legacy: bool) -> str:
    if record.state is ResponseState.QUEUED:  # no version knows the word
        return "in_progress"
    if legacy and record.state is ResponseState.INCOMPLETE:
        return "completed"
    return str(record.state)


def response_row(record: ResponseRecord, legacy: bool, store: bool = True) -> Row:
    """OpenAI's, with sference's words and items."""
    changes: Row = {"status": status(record, legacy), "output": None}
    if record.state.is_final:
        shown = _legacy_item if legacy else _item
        changes["output"] = [row for item in record.output for row in shown(item, record)]
    return show(record, store) | changes


def list_row(record: ResponseRecord, legacy: bool) -> Row:
    return {
        "id": record.id,
        "object": "response",
        "created_at": int(record.created_at),
        "model": record.model,
        "status": status(record, legacy),
    }


def stream_row(stream: Stream, counts: StreamCounts | None = None) -> Row:
    """In a list without counts: each would be a look at all that is in the stream."""
    row = {
        "id": stream.id,
        "name": stream.name,
        "window": stream.window,
        "status": str(stream.state),
        "created_at": iso(stream.created_at),
        "updated_at": iso(stream.updated_at),
        "cancelled_at": _iso(stream.cancelled_at),
        "archived_at": _iso(stream.archived_at),
    }
    if counts is None:
        return row
    ended = counts.completed + counts.failed + counts.cancelled
    last = counts.last
    return row | {
        "total_items": counts.total,
        "pending_items": counts.pending,
        "running_items": counts.running,
        "completed_items": counts.completed,
        "failed_items": counts.failed,
        "cancelled_items": counts.cancelled,
        "completion_ratio": ended / counts.total if counts.total else 0.0,
        "total_prompt_tokens": counts.input_tokens,
        "total_completion_tokens": counts.output_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "last_completion_at": _iso(last.response.ended_at) if last else None,
        "latest_completion_id": cursor(last.serial) if last else None,
    }


# -- events


def cursor(serial: int) -> str:
    """The id of an event: sorts as the feed does, and is good as long as the store is."""
    return f"cmpl_{serial:020d}"


def serial_of(name: str) -> int | None:
    found = _CURSOR.fullmatch(name)
    return int(found[1]) if found else None


def event_row(entry: FeedEntry, legacy: bool) -> Row:
    record = entry.response
    good = record.state in (ResponseState.COMPLETED, ResponseState.INCOMPLETE)
    usage = _usage(record)
    return {
        "completion_id": cursor(entry.serial),
        "response_id": record.id,
        "custom_id": record.custom_id,
        "status": status(record, legacy),
        "result": _completion(record) if good else None,
        "error": record.error,
        **(usage or dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"))),
        "completed_at": _iso(record.ended_at),
    }


def _completion(record: ResponseRecord) -> Row:
    """A response as a chat completion."""
    texts, reasoning, calls = [], [], []
    for item in record.output:
        if item["type"] == "message":
            texts += _texts(item)
        elif item["type"] == "reasoning":
            reasoning.append(_reasoning(item))
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
    message: Row = {"role": "assistant", "content": "".join(texts) if texts else None}
    message["refusal"] = None
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    finished = _FINISHED.get(record.incomplete, "length")
    return {
        "id": record.id,
        "object": "chat.completion",
        "created": int(record.created_at),
        "model": record.model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": "tool_calls" if calls and finished == "stop" else finished,
                "logprobs": None,
            }
        ],
        "usage": _usage(record),
    }


def _usage(record: ResponseRecord) -> Row | None:
    if record.usage is None:
        return None
    names = {"prompt": "input_tokens", "completion": "output_tokens", "total": "total_tokens"}
    return {f"{ours}_tokens": record.usage[theirs] for ours, theirs in names.items()}


# -- items of output


def _item(item: Item, record: ResponseRecord) -> list[Row]:
    """None of a kind that no client knows."""
    match item["type"]:
        case "message":
            parts = [part for part in item["content"] if part["type"] == "output_text"]
            return [item | {"content": parts}]
        case "reasoning":  # what 0.0.8 reads and what 0.3.2 does, in one
            text = _reasoning(item)
            summary = [{"type": "summary_text", "text": text}] if text else []
            row = {"type": "reasoning", "id": item["id"], "summary": summary}
            return [row | {"text": text, "format": _FORMAT}]
        case "function_call":
            return [item]
    return []


def _legacy_item(item: Item, record: ResponseRecord) -> list[Row]:
    """Texts. 0.0.1 knows nothing else, so reasoning is only told to whoever has asked for it."""
    if item["type"] == "message":
        return [{"type": "output_text", "text": text} for text in _texts(item)]
    if item["type"] == "reasoning" and record.request.get("include_reasoning"):
        return [{"type": "reasoning", "text": _reasoning(item), "format": _FORMAT}]
    return []


def _texts(message: Item) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "output_text"]


def _reasoning(item: Item) -> str:
    """Engines tell it as it is, in `content`; others sum it up."""
    parts = item.get("content") or item.get("summary") or ()
    return "".join(part["text"] for part in parts)


def _iso(at: float | None) -> str | None:
    return None if at is None else iso(at)
