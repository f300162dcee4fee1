"""A raw body of an inference route, checked.

What comes out goes to vLLM: the caller's own bytes, unless a field must be put into words that
vLLM understands. Refuse, never ignore. No I/O.
"""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from llm_engine.api.openai import fields, problems, response_fields
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import InvalidRequest
from llm_engine.nesting import is_too_deep

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Route:
    path: str
    shape: TypeAdapter[Any]
    known: frozenset[str]
    check: Callable[[Body], Body]  # the rules between fields; returns what must change


def parse(kind: Kind, body: bytes) -> EngineRequest:
    """Raises InvalidRequest for the first thing that is wrong."""
    data, changes = check(kind, body)
    if changes:
        body = orjson.dumps(changed(data, changes))
    path = _ROUTES[kind].path
    if kind is Kind.EMBEDDINGS:
        # vLLM's answer has all that OpenAI requires, and may be megabytes.
        return EngineRequest(kind, path, data["model"], False, body, False)
    return _generation(kind, path, data, body)


def check(kind: Kind, body: bytes) -> tuple[Body, Body]:
    """What is asked for, and what must change of it on its way to vLLM. Raises as `parse`."""
    data = read(body)
    return data, check_fields(kind, data)


def read(body: bytes) -> Body:
    """A body that is not checked yet. Raises InvalidRequest."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise problems.from_json(error, body) from None
    if type(data) is not dict:
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    if is_too_deep(data, body):
        raise InvalidRequest("The request body is nested too deeply.")
    return data


def check_fields(kind: Kind, data: Body) -> Body:
    """What must change of it on its way to vLLM. Raises as `parse`."""
    route = _ROUTES[kind]
    if not data.keys() <= route.known:
        _judge_unknown(kind, data)
    try:
        route.shape.validate_python(data)
    except ValidationError as error:
        raise problems.from_validation(error, data) from None
    return route.check(data)


def changed(data: Body, changes: Body) -> Body:
    return {k: v for k, v in (data | changes).items() if v is not _DROP}


def is_known(kind: Kind, field: str) -> bool:
    return field in _ROUTES[kind].known


_DROP: Any = object()  # in changes: the field goes


def _generation(kind: Kind, path: str, data: Body, body: bytes) -> EngineRequest:
    get = data.get
    stream = get("stream") is True
    options = get("stream_options")
    obfuscate = options is not None and options.get("include_obfuscation") is True
    top_logprobs = None
    if kind is Kind.CHAT and get("logprobs") and not get("logprob_token_ids"):
        top_logprobs = get("top_logprobs") or 0
    # Plain text streams are as OpenAI's already and go through byte for byte.
    rewrite = (
        not stream
        or obfuscate
        or (kind is Kind.CHAT and bool(get("logprobs") or get("tools")))
        or "repetition_detection" in data
        or "continue_final_message" in data
    )
    prompt = get("prompt")
    prompts = len(prompt) if type(prompt) is list and type(prompt[0]) is not int else 1
    choices = (get("n") or 1) * prompts
    return EngineRequest(
        kind, path, data["model"], stream, body, rewrite, choices, top_logprobs, obfuscate,
        store=kind is Kind.CHAT and get("store") is True,
    )  # fmt: skip


# -- rules between fields

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def _check_chat(data: Body) -> Body:
    get = data.get
    changes = _check_generate(data)
    if get("top_logprobs") and not get("logprobs"):
        raise _only_with("top_logprobs", "logprobs")
    limit, older = get("max_completion_tokens"), get("max_tokens")
    if limit is not None and older is not None and limit != older:
        raise problems.invalid(
            f"'max_tokens' is {older} but 'max_completion_tokens' is {limit}: set only one.",
            "max_tokens",
            "invalid_value",
        )
    for index, message in enumerate(data["messages"]):
        if message.get("content") is None and message["role"] == "assistant":
            _check_silent_assistant(index, message)
    if "tool_choice" in data:
        changes |= _check_tool_choice(data)
    if get("store"):
        check_labels(get("metadata"))
        # It is kept here: whoever answers need not keep it, too.
        changes |= {"store": _DROP, "metadata": _DROP}
    if get("logprobs") and not get("logprob_token_ids"):
        changes |= _one_more(get("top_logprobs"))
    return changes


def _one_more(wanted: int | None) -> Body:
    """vLLM counts the sampled token as one of the top: with one more, the true top is whole.
    `answers.keep_likeliest` sorts and cuts it."""
    return {"top_logprobs": wanted + 1} if wanted and wanted < 20 else {}


def check_labels(metadata: dict[str, str] | None) -> None:
    """Metadata that lists are to be searched by. Raises InvalidRequest."""
    for name, value in (metadata or {}).items():
        if "\0" in name + value:  # PostgreSQL could not search a list that holds it
            raise problems.invalid(
                "Invalid 'metadata': the character U+0000 cannot be kept.",
                ("metadata",),
                "invalid_value",
            )


def not_in_batches() -> InvalidRequest:
    return problems.invalid(
        "Unsupported value: 'store' does not support true in a batch, whose results are kept as "
        "files.",
        "store",
        "unsupported_value",
    )


def _check_silent_assistant(index: int, message: Body) -> None:
    if not message.get("tool_calls") and message.get("refusal") is None:
        raise problems.invalid(
            f"Missing required parameter: 'messages[{index}].content'. An assistant message may "
            "leave it out only when it has 'tool_calls'.",
            ("messages", index, "content"),
            "missing_required_parameter",
        )


def _check_tool_choice(data: Body) -> Body:
    choice, tools = data["tool_choice"], data.get("tools")
    if choice is None or choice == "none":
        return {}
    if not tools:
        raise _only_with("tool_choice", "tools")
    if isinstance(choice, str):
        return {}
    by_name = {tool["function"]["name"]: tool for tool in tools}
    if choice["type"] == "function":
        _find(by_name, choice, ("tool_choice", "function", "name"))
        return {}
    # allowed_tools: vLLM has no such choice, but without the other tools it comes to the same.
    allowed = choice["allowed_tools"]
    kept = [
        _find(by_name, tool, ("tool_choice", "allowed_tools", "tools", i, "function", "name"))
        for i, tool in enumerate(allowed["tools"])
    ]
    return {"tools": kept, "tool_choice": allowed["mode"]}


def _find(tools: dict[str, Body], reference: Body, path: problems.Path) -> Body:
    return _named(tools, reference["function"]["name"], path)


def _named(tools: dict[str, Body], name: str, path: problems.Path) -> Body:
    if name not in tools:
        raise problems.invalid(
            f"Invalid value for '{problems.param_of(path)}': {problems.show(name)} is not one of "
            "the functions in 'tools'.",
            path,
            "invalid_value",
        )
    return tools[name]


def _check_completion(data: Body) -> Body:
    best_of, n = data.get("best_of"), data.get("n") or 1
    changes = _check_generate(data)
    if "n" in data and data["n"] is None:
        changes["n"] = _DROP  # OpenAI's type has null, vLLM's has not
    if best_of is not None and best_of < n:
        raise problems.invalid(
            f"Invalid 'best_of': {best_of} is below 'n', which is {n}.", "best_of", "invalid_value"
        )
    if best_of is not None and best_of > n:  # vLLM would ignore it
        raise problems.unsupported(("best_of",))
    if data.get("max_tokens") == 0 and not data.get("echo"):
        raise problems.invalid(
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, unless "
            "'echo' is true, but got 0 instead.",
            "max_tokens",
            "integer_below_min_value",
        )
    return changes


def _check_generate(data: Body) -> Body:
    get = data.get
    changes: Body = {}
    if get("stream_options") is not None and not get("stream"):
        raise _only_with("stream_options", "stream")
    outputs = get("structured_outputs")
    if outputs is not None and not any(outputs.get(form) for form in _CONSTRAINTS):
        raise problems.invalid(
            f"Invalid 'structured_outputs': set one of {', '.join(_CONSTRAINTS)}.",
            "structured_outputs",
            "invalid_value",
        )
    temperature, top_p = get("temperature"), get("top_p")
    cold = temperature is not None and temperature < 1e-5  # what vLLM takes for 0
    greedy_many = cold and (get("n") or 1) > 1 and not get("use_beam_search")
    if top_p == 0 or greedy_many:
        # OpenAI allows both, vLLM neither; to keep the one likeliest token says the same.
        changes |= {"top_p": 1, "temperature": 1, "top_k": 1}
    if get("suppress_tokens"):
        # -100 is OpenAI's own way to ban a token.
        banned = dict.fromkeys(map(str, data["suppress_tokens"]), -100)
        changes["logit_bias"] = (get("logit_bias") or {}) | banned
    if "suppress_tokens" in data:
        changes["suppress_tokens"] = _DROP
    return changes


def _check_response(data: Body) -> Body:
    get = data.get
    if get("previous_response_id") is not None and get("conversation") is not None:
        raise problems.invalid(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation'. Use one.",
            "previous_response_id",
            "mutually_exclusive_parameters",
        )
    for param in ("background", "conversation"):
        if get(param) and get("store") is False:
            raise problems.invalid(
                f"Invalid '{param}': it needs 'store' to be true.", param, "invalid_value"
            )
    found = _check_generate({k: v for k, v in data.items() if k != "stream_options"})
    # Kept as JSON with the response; what is null goes where the engine is asked.
    changes = {k: None if v is _DROP else v for k, v in found.items()}
    if get("tool_choice") is not None:
        changes |= _check_function_choice(data)
    include = get("include") or []
    if get("top_logprobs") and _LOGPROBS not in include:
        changes["include"] = [*include, _LOGPROBS]
    return changes | _one_more(get("top_logprobs"))


_LOGPROBS = "message.output_text.logprobs"


def _check_function_choice(data: Body) -> Body:
    choice, tools = data["tool_choice"], data.get("tools")
    if choice in ("none", "auto"):
        return {}
    if not tools:
        raise _only_with("tool_choice", "tools")
    if isinstance(choice, str):
        return {}
    by_name = {tool["name"]: tool for tool in tools}
    if choice["type"] == "function":
        _named(by_name, choice["name"], ("tool_choice", "name"))
        return {}
    wanted = [
        _named(by_name, tool["name"], ("tool_choice", "tools", index, "name"))
        for index, tool in enumerate(choice["tools"])
    ]
    return {"tools": wanted, "tool_choice": choice["mode"]}


def _only_with(param: str, other: str) -> InvalidRequest:
    needed = "is set" if other == "tools" else "is true"
    return problems.invalid(
        f"Invalid '{param}': it is only allowed when '{other}' {needed}.", param, "invalid_value"
    )


# -- fields that are in no shape


def _judge_unknown(kind: Kind, data: Body) -> None:
    """Engines have fields of their own, so unknown ones pass; probable mistakes do not."""
    names = [name for name in data.keys() - _ROUTES[kind].known if data[name] is not None]
    if len(names) > _MAX_UNKNOWN:
        raise InvalidRequest(
            f"The request has {len(names)} unknown parameters; at most {_MAX_UNKNOWN} are let "
            "through.",
            code="unknown_parameter",
        )
    for name in names:
        hint = _mistake(kind, name[: problems.MAX_SHOWN])
        if hint is not None:
            message = f"Unknown parameter: '{name[: problems.MAX_SHOWN]}'. {hint}"
            raise problems.invalid(message, (name,), "unknown_parameter")


_MAX_UNKNOWN = 16  # each may cost a millisecond of comparing


@functools.lru_cache(1024)
def _mistake(kind: Kind, name: str) -> str | None:
    """What was probably meant; None when the name is like nothing known."""
    for route in _ROUTES.values():
        if name in route.known:
            return f"It belongs to {route.path}, not to {_ROUTES[kind].path}."
    known = sorted(_ROUTES[kind].known)
    meant = next((known_one for known_one in known if _plain(known_one) == _plain(name)), None)
    for close in [meant] if meant else difflib.get_close_matches(name, known, 1, 0.85):
        return f"Did you mean '{close}'?"
    return None


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _route(path: str, shape: TypeAdapter[Any], vllm: frozenset[str], check: Any) -> _Route:
    return _Route(path, shape, vllm | shape._type.__annotations__.keys(), check)


_ROUTES = {
    Kind.CHAT: _route("/v1/chat/completions", fields.CHAT, fields.VLLM_CHAT, _check_chat),
    Kind.COMPLETIONS: _route(
        "/v1/completions", fields.COMPLETION, fields.VLLM_COMPLETION, _check_completion
    ),
    Kind.EMBEDDINGS: _route(
        "/v1/embeddings", fields.EMBEDDING, fields.VLLM_EMBEDDING, lambda data: {}
    ),
    Kind.RESPONSES: _route(
        "/v1/responses",
        response_fields.RESPONSES,
        response_fields.VLLM_RESPONSES,
        _check_response,
    ),
}
