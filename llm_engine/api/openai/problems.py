"""From a failed check to OpenAI's error: message, `param` and `code`, for the first problem."""

from collections.abc import Callable
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from llm_engine.errors import InvalidRequest

Path = tuple[str | int, ...]

MAX_SHOWN = 64  # characters of a caller's value that an error message repeats

#: What to do instead of a field that can't be honoured. Anything else gets a plain refusal.
WHY = {
    "audio": "Models here answer in text only.",
    "functions": "Use 'tools' instead.",
    "function_call": "Use 'tools', 'tool_choice' and 'tool_calls' instead.",
    "modalities": "Models here answer in text only.",
    "moderation": "Answers are not moderated here.",
    "web_search_options": "Models here have no web search.",
    "best_of": "Ask for 'n' answers and choose among them.",
    "suffix": "Models here do not insert text.",
    "prompt_embeds": "Send 'prompt' as text or token ids.",
    "request_id": "Send the header 'X-Request-Id' instead.",
    "guided_json": "Use 'response_format' or 'structured_outputs' instead.",
    "guided_regex": "Use 'structured_outputs': {'regex': ...} instead.",
    "guided_choice": "Use 'structured_outputs': {'choice': [...]} instead.",
    "guided_grammar": "Use 'structured_outputs': {'grammar': ...} instead.",
}

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_attributes_type": "an object",
}


def parse(shape: TypeAdapter[Any], data: Any) -> dict[str, Any]:
    """A body of a shape that knows all of its fields. Raises InvalidRequest, first of all for one
    that it does not know."""
    try:
        return dict(shape.validate_python(data))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "extra_forbidden":
                param = param_of(item["loc"])
                raise invalid(
                    f"Unknown parameter: '{param}'.", param, "unknown_parameter"
                ) from None
        raise from_validation(error, data) from None


def from_validation(error: ValidationError, data: Any) -> InvalidRequest:
    """`data` is what was validated: it tells the caller's keys from pydantic's own marks."""
    found = error.errors(include_url=False)
    paths = [_path(item, data) for item in found]
    # The branches of a union each complain. The one that was meant is the one whose type fits;
    # when none does, the one that got furthest.
    rivals = [
        (path, item)
        for path, item in zip(paths, found, strict=True)
        if path[: len(paths[0])] == paths[0]
    ]
    for path, item in sorted(rivals, key=lambda rival: _progress(rival[0]), reverse=True):
        if not _is_about_type(item):
            return _describe(item, path)
    furthest = max((path for path, _ in rivals), key=_progress)
    problems = [item for path, item in rivals if path == furthest]
    wanted = list(dict.fromkeys(_EXPECTED.get(item["type"], "a string") for item in problems))
    expected = wanted[0] if len(wanted) == 1 else f"one of {', '.join(wanted[:-1])} or {wanted[-1]}"
    return invalid(
        f"Invalid type for '{param_of(furthest)}': expected {expected}, but got "
        f"{_kind(problems[0]['input'])} instead.",
        furthest,
        "invalid_type",
    )


def invalid(message: str, path: Path | str, code: str) -> InvalidRequest:
    param = path if isinstance(path, str) else param_of(path)
    return InvalidRequest(message, param=param or None, code=code)


def unsupported(path: Path) -> InvalidRequest:
    param = param_of(path)
    why = WHY.get(str(path[-1]), "")
    return invalid(
        f"Unsupported parameter: '{param}' is not supported here. {why}".strip(),
        param,
        "unsupported_parameter",
    )


def from_json(error: orjson.JSONDecodeError, body: bytes) -> InvalidRequest:
    what = str(error).split(":")[0]
    if not body.strip():
        where = "The request body is empty"
    elif "UTF-8" in what:
        where = _bad_utf8(body)
    else:
        word = next((w for w in ("NaN", "Infinity") if _starts(error, w)), None)
        what = f"{word} is not a JSON value" if word else what
        where = f"The request body is not valid JSON: {what} at line {error.lineno}"
        where += f", column {error.colno}"
    return InvalidRequest(f"{where}. Send a JSON object, encoded as UTF-8.")


def param_of(path: Path) -> str:
    """('messages', 0, 'role') gives messages[0].role"""
    param = ""
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            part = part if len(part) <= MAX_SHOWN else part[:MAX_SHOWN] + "..."
            param += f".{part}" if param else part
    return param


def show(value: Any) -> str:
    """A caller's value, short enough to be repeated to them."""
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= MAX_SHOWN else f"'{value[:MAX_SHOWN]}...'"
    if isinstance(value, dict | list):
        return _kind(value)
    return orjson.dumps(value).decode()


def _path(item: Any, data: Any) -> Path:
    """Where in `data`, without the marks that pydantic leaves for union branches and tags."""
    path: list[str | int] = []
    here = data
    for part in item["loc"]:
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(part)
            here = here[part]
        elif isinstance(here, dict) and part in here:
            path.append(part)
            here = here[part]
    if item["type"] == "missing":
        path.append(item["loc"][-1])
    elif item["type"].startswith("union_tag"):
        path.append(item["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _progress(path: Path) -> tuple[int, list[int]]:
    return len(path), [part for part in path if isinstance(part, int)]


def _is_about_type(item: Any) -> bool:
    if item["type"] == "literal_error":  # 5 is no string at all, 'x' is the wrong one
        return isinstance(item["input"], str) != ("'" in item["ctx"]["expected"])
    return item["type"] in _EXPECTED


def _describe(item: Any, path: Path) -> InvalidRequest:
    kind, context = item["type"], item.get("ctx", {})
    describe = _DESCRIBE.get(kind)
    if describe is None:
        return invalid(f"Invalid '{param_of(path)}': {item['msg']}.", path, "invalid_value")
    return describe(path, item["input"], context)


def _missing(path: Path, value: Any, context: Any) -> InvalidRequest:
    message = f"Missing required parameter: '{param_of(path)}'."
    return invalid(message, path, "missing_required_parameter")


def _not_none(path: Path, value: Any, context: Any) -> InvalidRequest:
    return unsupported(path)


def _bad_tag(path: Path, value: Any, context: Any) -> InvalidRequest:
    """A discriminator ('role', 'type') with a value that names no known shape."""
    given = value.get(path[-1])
    if not isinstance(given, str):
        return invalid(
            f"Invalid type for '{param_of(path)}': expected a string, but got {_kind(given)} "
            "instead.",
            path,
            "invalid_type",
        )
    return _not_among(path, given, {"expected": context["expected_tags"]})


def _not_among(path: Path, value: Any, context: Any) -> InvalidRequest:
    param, supported = param_of(path), context["expected"].replace("False", "false")
    if path[0] in _NARROWED:
        return invalid(
            f"Unsupported value: '{param}' does not support {show(value)} here. Supported values "
            f"are: {supported}. {WHY.get(str(path[0]), '')}".strip(),
            param,
            "unsupported_value",
        )
    return invalid(
        f"Invalid value for '{param}': {show(value)}. Supported values are: {supported}.",
        param,
        "invalid_value",
    )


#: Where OpenAI knows more values than can be honoured here.
_NARROWED = {"modalities", "service_tier", "suffix", "tools", "verbosity"}


def _limit(word: str, code: str, sign: str, key: str) -> Callable[[Path, Any, Any], InvalidRequest]:
    def describe(path: Path, value: Any, context: Any) -> InvalidRequest:
        limit = context[key]
        number = "decimal" if isinstance(limit, float) else "integer"
        shown = int(limit) if limit == int(limit) else limit
        return invalid(
            f"Invalid '{param_of(path)}': {number} {word} value. Expected a value {sign} "
            f"{shown}, but got {show(value)} instead.",
            path,
            f"{number}_{code}_value",
        )

    return describe


def _too_long(path: Path, value: Any, context: Any) -> InvalidRequest:
    limit, size = context["max_length"], len(value)
    param = param_of(path)
    if isinstance(value, dict):
        return invalid(
            f"Invalid '{param}': too many properties. Expected an object with at most {limit} "
            f"properties, but got an object with {size} properties instead.",
            param,
            "object_above_max_properties",
        )
    noun = "string" if isinstance(value, str) else "array"
    return invalid(
        f"Invalid '{param}': {noun} too long. Expected {_kind(value)} with maximum length "
        f"{limit}, but got {_kind(value)} with length {size} instead.",
        param,
        f"{noun}_above_max_length",
    )


def _too_short(path: Path, value: Any, context: Any) -> InvalidRequest:
    noun = "string" if isinstance(value, str) else "array"
    return invalid(
        f"Invalid '{param_of(path)}': empty {noun}. Expected {_kind(value)} with minimum length "
        f"{context['min_length']}, but got an empty {noun} instead.",
        path,
        f"empty_{noun}",
    )


def _bad_pattern(path: Path, value: Any, context: Any) -> InvalidRequest:
    message = f"Invalid '{param_of(path)}': {show(value)} does not match the pattern "
    return invalid(f"{message}'{context['pattern']}'.", path, "invalid_value")


_DESCRIBE: dict[str, Callable[[Path, Any, Any], InvalidRequest]] = {
    "missing": _missing,
    "none_required": _not_none,
    "union_tag_invalid": _bad_tag,
    "union_tag_not_found": _missing,
    "literal_error": _not_among,
    "less_than_equal": _limit("above maximum", "above_max", "<=", "le"),
    "greater_than_equal": _limit("below minimum", "below_min", ">=", "ge"),
    "greater_than": _limit("below minimum", "below_min", ">", "gt"),
    "too_long": _too_long,
    "string_too_long": _too_long,
    "too_short": _too_short,
    "string_too_short": _too_short,
    "string_pattern_mismatch": _bad_pattern,
}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string"}
    names |= {list: "an array", dict: "an object"}
    return names[type(value)]


def _starts(error: orjson.JSONDecodeError, word: str) -> bool:
    return error.doc[error.pos :].startswith(word)


def _bad_utf8(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"The request body is not valid UTF-8 at byte {error.start}"
    return "The request body starts with a byte order mark"
