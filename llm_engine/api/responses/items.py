"""Items, which responses and conversations are made of, in one form: with an id and a type, and
their content in parts. No I/O."""

import re
from typing import Any

from llm_engine.errors import InvalidRequest
from llm_engine.ids import new_id
from llm_engine.responses import Item

_PREFIX = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
MOST_ID = 80  # characters
_ID = re.compile(rf"[^\x00-\x1f\x7f]{{1,{MOST_ID}}}")
_ROLES = ("user", "system", "developer", "assistant")
_PARTS = frozenset({"input_text", "output_text", "input_image", "input_file", "refusal"})
_TEXTS = {"function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id",)}


def whole(given: Any, param: str = "input") -> list[Item]:
    """A request's `input` as items. Raises InvalidRequest."""
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, param)]
    return [whole_item(item, f"{param}[{index}]") for index, item in enumerate(given)]


def whole_item(item: Any, param: str) -> Item:
    """Raises InvalidRequest for what is no item, or none that models here know."""
    if not isinstance(item, dict):
        raise _wrong(param, "it must be an object")
    kind = item.get("type", "message" if "role" in item else None)
    name = item.get("id")
    if name is not None and not (isinstance(name, str) and _ID.fullmatch(name)):
        raise _wrong(f"{param}.id", f"it must be a text of at most {MOST_ID} plain characters")
    if kind == "message":
        return _message(item, param)
    if kind == "item_reference":
        raise _wrong(
            param,
            "items cannot be referred to by their ids. Send the item itself, or the id of its "
            "response as 'previous_response_id'",
        )
    if not isinstance(kind, str) or kind not in _PREFIX:
        known = ", ".join(f"'{each}'" for each in _PREFIX)
        raise _wrong(f"{param}.type", f"it must be one of {known}")
    for field in _TEXTS.get(kind, ()):
        if not isinstance(item.get(field), str):
            raise _wrong(f"{param}.{field}", "it must be a text")
    if kind == "function_call_output" and not isinstance(item.get("output"), str | list):
        raise _wrong(f"{param}.output", "it must be a text or a list of parts")
    if kind == "reasoning":
        item = {"summary": []} | item
    return _named(item, kind)


def _message(item: Item, param: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise _wrong(f"{param}.role", f"it must be one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        content = [_text(role, content)]
    elif not isinstance(content, list) or not content:
        raise _wrong(f"{param}.content", "it must be a text or a list of parts, and not empty")
    parts = [_part(part, f"{param}.content[{n}]") for n, part in enumerate(content)]
    return _named(item | {"content": parts}, "message")


def _text(role: str, text: str) -> Item:
    return {"type": "output_text" if role == "assistant" else "input_text", "text": text}


def _part(part: Any, param: str) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise _wrong(f"{param}.type", f"it must be one of {', '.join(sorted(_PARTS))}")
    text = "refusal" if kind == "refusal" else "text"
    if kind.endswith("_text") or kind == "refusal":
        if not isinstance(part.get(text), str):
            raise _wrong(f"{param}.{text}", "it must be a text")
    if kind == "output_text":
        return {"annotations": [], "logprobs": []} | {
            k: v for k, v in part.items() if v is not None
        }
    return {"detail": "auto"} | part if kind == "input_image" else part


def _named(item: Item, kind: str) -> Item:
    given = {key: value for key, value in item.items() if value is not None}
    named = {"id": new_id(_PREFIX[kind]), "type": kind, "status": "completed"} | given
    return named | {"type": kind}


def _wrong(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {why}.", param=param, code="invalid_value")
