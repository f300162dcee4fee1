"""vLLM's answers and errors, put right where they leave OpenAI's specification.

Whole answers, the events of streams that need it (`EngineRequest.rewrite`), and error bodies.
Knows nothing of HTTP or of event framing. No I/O.
"""

import re
import secrets
from collections.abc import Iterable
from typing import Any

import orjson

from llm_engine.api import sse
from llm_engine.api.openai.requests import is_known
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.engine.base import AdapterProblem
from llm_engine.errors import (
    APIError,
    EngineFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    StorageUnavailable,
    Unavailable,
)

Object = dict[str, Any]

#: Keys that OpenAI sends although they are null; vLLM's other nulls only swell the answer.
_NULL_OF_ANSWER = {"usage"}
_NULL_OF_CHOICE = {"logprobs", "finish_reason"}
_NULL_OF_MESSAGE = {"content", "refusal"}

_FINISHED = {"stop", "length", "tool_calls", "content_filter", "function_call"}
#: The engine gave up: what it made so far is no answer.
_BROKEN = {"abort", "error"}

_OBFUSCATION_STEP = 32  # event sizes are rounded up to a multiple of this


class OpenAIForm:
    """The dialect that engines speak already, nearly."""

    def answer(self, request: EngineRequest, body: bytes) -> bytes:
        return rewrite_answer(request, body)

    def event(self, request: EngineRequest, payload: bytes) -> bytes:
        if payload == sse.DONE:
            return sse.event(payload)
        event = rewrite_event(request, payload)
        if event.startswith(b'{"error"'):
            raise _interrupted()
        return sse.event(event)

    def error(self, status: int, body: bytes, request: EngineRequest) -> APIError:
        return engine_error(status, body, request)

    def failure(self, error: APIError) -> bytes:
        return sse.error_event(error)


# -- answers


def rewrite_answer(request: EngineRequest, body: bytes) -> bytes:
    """A whole 200 answer. Raises InternalError when the engine gave up in the middle."""
    answer = orjson.loads(body)
    if request.shown is not None:
        answer["model"] = request.shown
    if request.kind is Kind.EMBEDDINGS:
        return orjson.dumps(answer)
    for choice in answer["choices"]:
        if choice.get("finish_reason") in _BROKEN:
            raise _interrupted()
        message = choice.get("message")
        if message is not None:
            choice["message"] = _message(message)
    _rewrite_choices(request, answer)
    answer["usage"] = _without_null(answer.get("usage") or {})
    return orjson.dumps(_without_null(answer, _NULL_OF_ANSWER))


def rewrite_event(request: EngineRequest, event: bytes) -> bytes:
    """The payload of one event. An engine that gave up becomes an error event."""
    chunk = orjson.loads(event)
    if request.shown is not None:
        chunk["model"] = request.shown
    for choice in chunk["choices"]:
        if choice.get("finish_reason") in _BROKEN:
            return orjson.dumps(_interrupted().body())
        if "delta" in choice:
            _rewrite_delta(choice["delta"])
    _rewrite_choices(request, chunk)
    chunk = _without_null(chunk, _NULL_OF_ANSWER)
    if request.obfuscate:
        chunk["obfuscation"] = ""
        size = len(orjson.dumps(chunk))
        chunk["obfuscation"] = secrets.token_hex(_OBFUSCATION_STEP)[: -size % _OBFUSCATION_STEP]
    return orjson.dumps(chunk)


def _rewrite_delta(delta: Object) -> None:
    if delta.get("role"):
        delta["role"] = "assistant"  # see _message
    for call in delta.get("tool_calls", ()):
        # Clients add up the pieces of `arguments`: the first must not be missing.
        if "id" in call and "function" in call:
            call["function"].setdefault("arguments", "")


def _rewrite_choices(request: EngineRequest, answer: Object) -> None:
    for index, choice in enumerate(answer["choices"]):
        reason = choice.setdefault("finish_reason", None)
        if reason is not None and reason not in _FINISHED:
            choice["finish_reason"] = "stop"  # "repetition": the caller asked for that stop
        if choice.get("logprobs") is not None and request.kind is Kind.CHAT:
            _rewrite_logprobs(choice["logprobs"], request.top_logprobs)
        answer["choices"][index] = _without_null(choice, _NULL_OF_CHOICE)


def _message(message: Object) -> Object:
    message["role"] = "assistant"  # continue_final_message makes vLLM repeat the last role
    if message.get("tool_calls") and not message.get("content"):
        message["content"] = None
    message["annotations"] = message.get("annotations") or []
    return _without_null(message, _NULL_OF_MESSAGE)


def _rewrite_logprobs(logprobs: Object, top: int | None) -> None:
    logprobs.setdefault("refusal", None)
    if top is not None:
        keep_likeliest(logprobs["content"] or (), top)


def keep_likeliest(tokens: Iterable[Object], top: int) -> None:
    """Of each token's `top_logprobs`. vLLM lists the sampled token first, whatever its rank;
    `requests` asked for one more."""
    for token in tokens:
        likeliest = sorted(token["top_logprobs"], key=_logprob, reverse=True)
        token["top_logprobs"] = likeliest[:top]


def _logprob(token: Object) -> float:
    return token["logprob"]


def _without_null(given: Object, keep: set[str] | frozenset[str] = frozenset()) -> Object:
    return {key: value for key, value in given.items() if value is not None or key in keep}


def _interrupted() -> APIError:
    return InternalError(
        "The engine stopped before the answer was complete. Send the request again.",
        code="generation_interrupted",
    )


# -- errors

_ADAPTER_PROBLEMS = frozenset(map(str, AdapterProblem))


def engine_error(status: int, body: bytes, request: EngineRequest) -> APIError:
    """What vLLM said, as the error that the caller gets."""
    told = _told(body)
    code = told.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        status = code  # an error inside a stream comes with HTTP status 200
    if told.get("type") in _ADAPTER_PROBLEMS:
        return _adapter_problem(AdapterProblem(told["type"]), told, request)
    if status == 503 and told.get("type") != "ServiceUnavailableError":
        return Overloaded(
            f"The model '{request.called}' has too many requests waiting. Try again shortly.",
            param="model",
            retry_after=1,
        )
    if status == 404:
        return _not_found(told, request)
    if status in (401, 403) or (status >= 500 and status != 501):
        return _engine_failed(status, told, request)
    return _refused(told, request)


def _adapter_problem(problem: AdapterProblem, told: Object, request: EngineRequest) -> APIError:
    """What keeps an engine that is well from answering with an adapter."""
    why = f"The model '{request.called}' cannot answer now: {told.get('message')}"
    match problem:
        case AdapterProblem.MISSING:  # deleted a moment ago
            return _unknown(request)
        case AdapterProblem.BROKEN:
            return InternalError(why, param="model", code="adapter_broken")
        case AdapterProblem.STORAGE:
            return StorageUnavailable(why, param="model", retry_after=1)
        case AdapterProblem.ELSEWHERE:
            return Unavailable(why, param="model", code="adapter_elsewhere", retry_after=1)


def _told(body: bytes) -> Object:
    try:
        error = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _not_found(told: Object, request: EngineRequest) -> APIError:
    if told.get("type") != "NotFoundError":  # the engine has no such route
        return InvalidRequest(
            f"The model '{request.called}' does not support {request.path}.",
            param="model",
            code="invalid_value",
        )
    return _unknown(request)


def _unknown(request: EngineRequest) -> NotFound:
    return NotFound(
        f"The model '{request.called}' does not exist.", param="model", code="model_not_found"
    )


def _engine_failed(status: int, told: Object, request: EngineRequest) -> APIError:
    dead = "EngineCore" in str(told.get("message"))
    if dead or status == 503:
        kind = EngineFailed if dead else Unavailable
        return kind(
            f"The model '{request.called}' cannot answer now: its engine failed. Try again "
            "shortly.",
            param="model",
            code=Unavailable.code,
            status=Unavailable.status,
            retry_after=1,
        )
    # vLLM's words are for its operator, and in its own log.
    return EngineFailed(f"The engine of the model '{request.called}' failed at this request.")


def _refused(told: Object, request: EngineRequest) -> InvalidRequest:
    message, param = _clean(str(told.get("message") or "")), told.get("param")
    if message.startswith(_PROMPT_FILLS_CONTEXT):
        message = "The prompt fills this model's whole context: no token is left for an answer."
        return InvalidRequest(message, param=_prompt_of(request), code="context_length_exceeded")
    if "maximum context length" in message or "longer than the maximum model length" in message:
        return InvalidRequest(message, param=_prompt_of(request), code="context_length_exceeded")
    if limit := _TOO_MANY.fullmatch(message):
        return InvalidRequest(
            f"{limit[1]} is too large: {limit[2]}. This model's context length is {limit[3]} "
            "tokens, prompt and answer together.",
            param=limit[1],
            code="invalid_value",
        )
    if _PYDANTIC.match(message):
        return _from_pydantic(message, param, request)
    param = _param(param, message, request)
    if not message or _PYTHON.search(message):
        message = "The engine cannot use this request: a field has the wrong type or shape."
    return InvalidRequest(message, param=param, code="invalid_value" if param else None)


#: vLLM cuts max_tokens to the room that is left; the caller's own was checked before it.
_PROMPT_FILLS_CONTEXT = "max_tokens must be at least 1, got"
_NOTE = re.compile(r" \(parameter=.*\)$", re.DOTALL)
_TOO_MANY = re.compile(r"(\w+)=(\d+) cannot be greater than max_model_len=(\d+)\..*", re.DOTALL)
_PYDANTIC = re.compile(r"\d+ validation errors?\b")
_PYDANTIC_SAYS = re.compile(r"""'msg': (['"])(.*?)\1, '(?:input|ctx|url)'""")
_PYTHON = re.compile(r"'\w+' object |Traceback|unhashable type|unexpected keyword")
_CLASS = re.compile(r"\.[A-Z]\w+")
_MUST = re.compile(r"\b(\w+) (?:must|cannot)\b")  # "min_tokens must be ..."
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_MAX_MESSAGE = 1000


def _clean(message: str) -> str:
    message = _NOTE.sub("", message)
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."


def _from_pydantic(message: str, param: Any, request: EngineRequest) -> InvalidRequest:
    """vLLM repeats pydantic's list of complaints; its first sentence is enough."""
    param = _param(param, "", request)
    said = _PYDANTIC_SAYS.search(message)
    what = f"'{param}'" if param else "the request body"
    why = f" {said[2]}." if said else " It does not have the shape that the engine expects."
    return InvalidRequest(f"Invalid value for {what}:{why}", param=param, code="invalid_value")


def _param(param: Any, message: str, request: EngineRequest) -> str | None:
    if isinstance(param, str) and param:
        path = _CLASS.sub("", _INDEX.sub(r"[\1]", param.removeprefix("body.")))
        if is_known(request.kind, path.partition(".")[0].partition("[")[0]):
            return path
    if message.startswith("Grammar error"):
        return "response_format" if b'"response_format"' in request.body else "structured_outputs"
    if "not a multimodal model" in message:
        return "messages"
    if message.startswith("Token id"):
        return _prompt_of(request)
    named = _MUST.search(message)
    return named[1] if named and is_known(request.kind, named[1]) else None


def _prompt_of(request: EngineRequest) -> str:
    names = {Kind.CHAT: "messages", Kind.COMPLETIONS: "prompt"}
    return names.get(request.kind, "input")
