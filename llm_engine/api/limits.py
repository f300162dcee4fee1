"""The token limits that registered models set: checked and put into the request."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import InvalidRequest
from llm_engine.records import ModelRecord

#: Of text in any language, more than a token has on average (English: 4 to 5). What is estimated
#: with it is rarely above the truth, so that hardly anything that fits is refused here; what does
#: not fit and passes is refused by the model itself.
BYTES_PER_TOKEN = 8
_OUTPUT = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_PROMPT = {Kind.CHAT: "messages", Kind.COMPLETIONS: "prompt"}
_TALKS = (Kind.CHAT, Kind.RESPONSES)


def hold(
    request: EngineRequest, models: Sequence[ModelRecord], served_context: int = 0
) -> EngineRequest:
    """The request within the limits of every model on its way; the tightest ones count.

    `served_context`: the context length of the endpoint at the end of the way, where it is known.
    Raises InvalidRequest where the request asks for more.
    """
    ceilings = [m for m in models if m.max_output_token_count is not None]
    contexts = [m for m in models if m.max_token_count is not None]
    if not ceilings and not contexts:
        return request
    data = orjson.loads(request.body)
    name = next((n for n in _OUTPUT if data.get(n) is not None), None)
    asked = data[name] if name else None
    if contexts:
        _check_context(request, min(contexts, key=_context), data, asked or 0)
    if not ceilings or request.kind is Kind.EMBEDDINGS:
        return request
    tightest = min(ceilings, key=_ceiling)
    ceiling = _ceiling(tightest)
    if asked is not None and asked > ceiling:
        raise InvalidRequest(
            f"'{name}' is {asked}; '{tightest.name}' answers with at most {ceiling} tokens.",
            param=name,
            code="integer_above_max_value",
        )
    # Text completions that do not say end after 16 tokens, as OpenAI has it. An engine whose
    # context is no longer than the ceiling keeps below it by itself, and would refuse it.
    if asked is not None or request.kind not in _TALKS or 0 < served_context <= ceiling:
        return request
    talk = request.kind is Kind.RESPONSES
    field = "max_output_tokens" if talk else output_field(models[-1])
    return replace(request, body=orjson.dumps(data | {field: ceiling}))


def output_field(model: ModelRecord) -> str:
    """`max_tokens` is what every upstream knows, old or new, but for OpenAI's own newest."""
    is_openai = model.url is not None and "//api.openai.com" in model.url
    return "max_completion_tokens" if is_openai else "max_tokens"


def _ceiling(model: ModelRecord) -> int:
    assert model.max_output_token_count is not None
    return model.max_output_token_count


def _context(model: ModelRecord) -> int:
    assert model.max_token_count is not None
    return model.max_token_count


def _check_context(
    request: EngineRequest, model: ModelRecord, data: dict[str, Any], output_tokens: int
) -> None:
    field = _PROMPT.get(request.kind, "input")
    tokens = _estimate(request.kind, data.get(field))
    if tokens + output_tokens > _context(model):
        raise InvalidRequest(
            f"This model's maximum context length is {_context(model)} tokens, and the "
            f"request is for at least {tokens + output_tokens}: about {tokens} of prompt and "
            f"{output_tokens} of output.",
            param=field,
            code="context_length_exceeded",
        )


def _estimate(kind: Kind, prompt: Any) -> int:
    """Tokens of the longest prompt: each of several has the context to itself."""
    if kind in _TALKS:
        return max(1, sum(_text_bytes(message) for message in prompt) // BYTES_PER_TOKEN)
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return max((_length(each) for each in (prompt if several else [prompt])), default=1)


def _length(prompt: Any) -> int:
    if isinstance(prompt, str):
        return max(1, len(prompt.encode()) // BYTES_PER_TOKEN)
    return len(prompt) if isinstance(prompt, list) else 1  # token ids count themselves


def _text_bytes(message: dict[str, Any]) -> int:
    """Only what is text: nobody here knows how many tokens an image is."""
    content = message.get("content", message.get("output"))
    texts = [content] if isinstance(content, str) else []
    if isinstance(content, list):
        texts += [part.get("text") for part in content if isinstance(part, dict)]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        texts += [function.get("arguments")] if isinstance(function, dict) else []
    return sum(len(text.encode()) for text in texts if isinstance(text, str))
