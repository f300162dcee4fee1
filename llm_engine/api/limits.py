"""The token limits that a registered model sets: checked and put into the request."""

from dataclasses import replace

import orjson

from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import InvalidRequest
from llm_engine.records import ModelRecord

#: A token is rarely longer than this: an estimate from below, so that nothing that fits is refused.
BYTES_PER_TOKEN = 5
_OUTPUT = ("max_completion_tokens", "max_tokens")
_PROMPT = {Kind.CHAT: "messages", Kind.COMPLETIONS: "prompt", Kind.EMBEDDINGS: "input"}


def hold(request: EngineRequest, model: ModelRecord) -> EngineRequest:
    """The request within the model's limits. Raises InvalidRequest where it asks for more."""
    ceiling, context = model.max_output_token_count, model.max_token_count
    if ceiling is None and context is None:
        return request
    data = orjson.loads(request.body)
    name = next((n for n in _OUTPUT if data.get(n) is not None), None)
    asked = data[name] if name else None
    if ceiling is not None and asked is not None and asked > ceiling:
        raise InvalidRequest(
            f"'{name}' is {asked}; '{model.name}' answers with at most {ceiling} tokens.",
            param=name,
            code="integer_above_max_value",
        )
    if context is not None:
        _check_context(request, model, data, asked or 0)
    if ceiling is not None and asked is None and request.kind is not Kind.EMBEDDINGS:
        # `max_tokens` is what every upstream knows, old or new, but for OpenAI's own newest.
        key = "max_completion_tokens" if _is_openai(model) and request.kind is Kind.CHAT else None
        return replace(request, body=orjson.dumps(data | {key or "max_tokens": ceiling}))
    return request


def _check_context(
    request: EngineRequest, model: ModelRecord, data: dict, output_tokens: int
) -> None:
    field = _PROMPT[request.kind]
    prompt = data.get(field)
    size = len(prompt.encode()) if isinstance(prompt, str) else len(orjson.dumps(prompt))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        tokens = len(prompt)
    else:
        tokens = size // BYTES_PER_TOKEN
    assert model.max_token_count is not None
    if tokens + output_tokens > model.max_token_count:
        raise InvalidRequest(
            f"This model's maximum context length is {model.max_token_count} tokens, and the "
            f"request is for at least {tokens + output_tokens}: about {tokens} of prompt and "
            f"{output_tokens} of output.",
            param=field,
            code="context_length_exceeded",
        )


def _is_openai(model: ModelRecord) -> bool:
    return model.url is not None and "//api.openai.com" in model.url
