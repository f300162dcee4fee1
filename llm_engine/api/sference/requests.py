"""A body of sference's /v1/responses: OpenAI's, but for its metadata and two switches. No I/O."""

from collections.abc import Iterable
from typing import Any

import orjson

from llm_engine.api.openai.requests import check_fields, read
from llm_engine.api.requests import Kind
from llm_engine.api.responses import items
from llm_engine.api.responses.engine import CHANGES
from llm_engine.api.responses.operations import NewResponse
from llm_engine.api.sference.bodies import flag, thinking
from llm_engine.errors import InvalidRequest

Body = dict[str, Any]

DIALECT = "sference"
#: Of the metadata, which may hold any JSON.
MOST_KEYS = 64
MOST_BYTES = 16 * 2**10
MOST_DEPTH = 32
MOST_ID = 512  # characters of a custom_id
MOST_NAME = 256  # characters of a stream's id


def parse(body: bytes, legacy: bool) -> NewResponse:
    """Raises InvalidRequest for the first thing that is wrong. The stream and the window that the
    metadata names are not looked at yet."""
    data = read(body)
    metadata = _metadata(data.pop("metadata", None))
    custom_id = _text(metadata, "custom_id", MOST_ID)
    stream = _text(metadata, "stream_id", MOST_NAME)
    if flag("include_reasoning", data.get("include_reasoning")) is None:
        data.pop("include_reasoning", None)
    data = thinking(data, flag("enable_thinking", data.pop("enable_thinking", None)))
    changes = check_fields(Kind.RESPONSES, data)
    asynchronous = (
        data.pop("background", None) is True
        or stream is not None
        or metadata.get("completion_window") is not None
    )
    streamed = data.pop("stream", None) is True
    store = data.get("store") is not False
    _check_mode(data, asynchronous, streamed, store, legacy)
    if metadata:
        data["metadata"] = metadata
    talk = data.pop("conversation", None)
    return NewResponse(
        dialect=DIALECT,
        model=data.pop("model"),
        input=items.whole(data.pop("input")),
        background=asynchronous,
        streamed=streamed,
        store=store,
        previous=data.pop("previous_response_id", None),
        conversation=talk["id"] if isinstance(talk, dict) else talk,
        stream=stream,
        custom_id=custom_id,
        request=data | {CHANGES: changes},
    )


def _check_mode(data: Body, asynchronous: bool, streamed: bool, store: bool, legacy: bool) -> None:
    if asynchronous and not store:
        raise _wrong("store", "what is answered later must be stored")
    if streamed and asynchronous:
        raise _wrong("stream", "what is answered later is not streamed; see /v1/responses/events")
    if streamed and legacy:
        raise _wrong("stream", "it must be false here: streams are at /sference")
    if legacy and data.get("tools"):
        raise _wrong("tools", "clients of this URL cannot read function calls: see /sference")


def _metadata(given: Any) -> Body:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _wrong("metadata", "it must be an object", "invalid_type")
    if len(given) > MOST_KEYS:
        raise _wrong("metadata", f"it has over {MOST_KEYS} keys", "object_above_max_properties")
    try:
        size = len(orjson.dumps(given))
    except TypeError:
        raise _too_deep() from None
    if size > MOST_BYTES:
        raise _wrong("metadata", f"it is larger than {MOST_BYTES} bytes")
    level = [given]
    for _ in range(MOST_DEPTH):
        level = [child for value in level for child in _children(value)]
    if level:
        raise _too_deep()
    return given


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _text(metadata: Body, name: str, most: int) -> str | None:
    value = metadata.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= most or "\0" in value:
        raise _wrong(f"metadata.{name}", f"it must be a text of 1 to {most} characters")
    return value


def _too_deep() -> InvalidRequest:
    return _wrong("metadata", f"it is nested in over {MOST_DEPTH} levels")


def _wrong(param: str, why: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {why}.", param=param, code=code)
