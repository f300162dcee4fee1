"""A row's body, chat's or the Responses API's, as a body of /v1/chat/completions. No I/O.

What chat has, too, is left for the check that every chat body goes through.
"""

from typing import Any

from llm_engine.errors import InvalidRequest

Body = dict[str, Any]

#: Fields of a Responses body that chat calls otherwise, or the same.
_RENAMED = {"max_output_tokens": "max_completion_tokens"}
_SAME = frozenset(
    "model temperature top_p metadata user safety_identifier prompt_cache_key".split()
)
_FLAGS = ("enable_thinking", "include_reasoning")
_ROLES = ("user", "system", "developer", "assistant")
_TEXT = ("input_text", "output_text", "text")


def to_chat(body: Body) -> Body:
    """Raises InvalidRequest."""
    rest = dict(body)
    for field in ("background", "stream"):
        if rest.pop(field, None) not in (None, False):
            raise _wrong(field, "it must be false, for a batch answers as a whole")
    if "messages" in rest and "input" in rest:
        raise _wrong("input", "a row has either 'messages' or 'input', not both")
    if "messages" not in rest and "input" not in rest:
        raise InvalidRequest(
            "Missing required parameter: 'messages' (or 'input').",
            param="messages",
            code="missing_required_parameter",
        )
    flags = {name: flag(name, rest.pop(name, None)) for name in _FLAGS}
    chat = rest if "messages" in rest else _from_responses(rest)
    if flags["include_reasoning"] is not None:
        chat["include_reasoning"] = flags["include_reasoning"]
    return thinking(chat, flags["enable_thinking"])


def thinking(body: Body, wanted: bool | None) -> Body:
    """The body of any engine's route with sference's `enable_thinking`."""
    options = body.get("chat_template_kwargs") or {}
    if wanted is None or not isinstance(options, dict):  # which is refused like anybody's
        return body
    return body | {"chat_template_kwargs": options | {"enable_thinking": wanted}}


def shown(error: InvalidRequest, body: Body) -> InvalidRequest:
    """An error about a chat body in the words of the row that it was made of."""
    message, param = error.message, error.param
    if "input" in body:
        for theirs, ours in _RENAMED.items():
            message = message.replace(ours, theirs)
            param = theirs if param == ours else param
    return InvalidRequest(message, param=param, code=error.code)


def flag(name: str, value: Any) -> bool | None:
    """Raises InvalidRequest."""
    if value is None or isinstance(value, bool):
        return value
    raise _wrong(name, "it must be true or false")


def _from_responses(body: Body) -> Body:
    chat: Body = {"messages": [*_instructions(body.get("instructions")), *_messages(body["input"])]}
    for field, value in body.items():
        if field in _SAME:
            chat[field] = value
        elif field in _RENAMED:
            chat[_RENAMED[field]] = value
        elif field not in ("input", "instructions") and value is not None:
            raise InvalidRequest(
                f"Unsupported parameter: '{field[:64]}' is not supported in a row with 'input'.",
                param=field[:64],
                code="unsupported_parameter",
            )
    return chat


def _instructions(text: Any) -> list[Body]:
    if text is None:
        return []
    if not isinstance(text, str):
        raise _wrong("instructions", "it must be a string")
    return [{"role": "system", "content": text}]


def _messages(given: Any) -> list[Body]:
    if isinstance(given, str) and given:
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _wrong("input", "it must be a text or a list of messages, and not empty")
    return [_message(f"input[{index}]", item) for index, item in enumerate(given)]


def _message(where: str, item: Any) -> Body:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise _wrong(where, "it must be a message, with 'role' and 'content'")
    if item.get("role") not in _ROLES:
        raise _wrong(f"{where}.role", f"it must be one of {', '.join(_ROLES)}")
    content = item.get("content")
    if isinstance(content, list) and content:
        content = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise _wrong(f"{where}.content", "it must be a text or a list of parts")
    return {"role": item["role"], "content": content}


def _part(where: str, part: Any) -> Body:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        image = {"url": part["image_url"]} | (
            {"detail": part["detail"]} if "detail" in part else {}
        )
        return {"type": "image_url", "image_url": image}
    raise _wrong(where, "it must be an input_text with a 'text', or an input_image with a URL")


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {message}.", param=param, code="invalid_value")
