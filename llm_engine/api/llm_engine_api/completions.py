"""completions-sync and completions-stream: from this API's body to the engines'. The token path."""

import re
from typing import Any
from urllib.parse import parse_qs

import orjson

from llm_engine.api.cold import check
from llm_engine.api.dispatch import Dispatcher
from llm_engine.api.http import Call
from llm_engine.api.llm_engine_api.answers import CompletionForm
from llm_engine.api.llm_engine_api.fields import Completion
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import APIError, InvalidRequest
from llm_engine.records import Scope
from llm_engine.services import Services

#: The client's own defaults, for callers that leave the fields out.
MAX_NEW_TOKENS = 20
TEMPERATURE = 0.2

PATH = "/v1/completions"
_SAME = ("presence_penalty", "frequency_penalty", "top_k", "top_p", "include_stop_str_in_output")
_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_SHOWN = 100  # characters of a name that an error message repeats


class Completions:
    """One of the two routes; they differ in how the answer comes."""

    def __init__(self, services: Services, dispatcher: Dispatcher, *, stream: bool) -> None:
        self._dispatcher = dispatcher
        self._services = services
        self._limit = services.settings.gateway.max_body_bytes
        self._stream = stream

    async def __call__(self, call: Call) -> None:
        """Answers the call, or raises APIError while nothing has been sent yet."""
        asked = parse(await call.body(self._limit))
        name = model_name(call.scope["query_string"])
        try:
            call.require(Scope.INFERENCE)
            route = await self._services.route(call.principal, name, Kind.COMPLETIONS.task)
            body = engine_body(asked, name, self._stream, ours=route.upstream is None)
            request = EngineRequest(
                Kind.COMPLETIONS, PATH, name, self._stream, _dumps(body), rewrite=True
            )
            form = CompletionForm(log_probs=bool(asked.return_token_log_probs))
            await self._dispatcher.serve(call, request, form)
        except APIError as error:
            raise self._in_our_words(error, name) from None

    def _in_our_words(self, error: APIError, name: str) -> APIError:
        if error.code == "model_not_found":
            missing = f"Model endpoint {name[:_SHOWN]} not found."
            error.message = (
                missing if self._stream else "The specified endpoint could not be found."
            )
        error.message = _MAX_TOKENS.sub("max_new_tokens", error.message)
        return error


_MAX_TOKENS = re.compile(r"\bmax_tokens\b")


def model_name(query: bytes) -> str:
    """Only the query string has it. Slashes in it come unescaped."""
    names = parse_qs(query.decode("latin-1")).get("model_endpoint_name", [])
    if len(names) != 1:
        raise InvalidRequest(
            "Missing required parameter: 'model_endpoint_name'. Put the model's name, once, into "
            "the query string.",
            param="model_endpoint_name",
        )
    return names[0]


def parse(body: bytes) -> Completion:
    """The body, checked. Raises InvalidRequest for the first thing that is wrong."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return checked(data)


def checked(data: dict[str, Any]) -> Completion:
    """Raises InvalidRequest for the first thing that is wrong."""
    asked = check(Completion, data)
    _check_sampling(asked)
    guides = [name for name in _GUIDES if getattr(asked, name) is not None]
    if len(guides) > 1:
        raise InvalidRequest(f"Set only one of {', '.join(guides)}.", param=guides[1])
    return asked


def _dumps(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise InvalidRequest(
            "Invalid 'guided_json': it is nested too deeply.", param="guided_json"
        ) from None


def _check_sampling(asked: Completion) -> None:
    if asked.top_k == 0:
        raise InvalidRequest(
            "Invalid 'top_k': it must be -1 (all tokens) or above 0.", param="top_k"
        )
    if asked.temperature != 0:
        return
    for name, neutral in (("top_k", -1), ("top_p", 1.0)):
        if getattr(asked, name) not in (None, neutral):
            raise InvalidRequest(
                f"Invalid '{name}': temperature 0 takes the likeliest token, so '{name}' can only "
                f"be {neutral:g} or left out.",
                param=name,
            )


def engine_body(asked: Completion, model: str, stream: bool, *, ours: bool) -> dict[str, Any]:
    """The same for an engine. `ours`: it is vLLM, not a server elsewhere that may refuse its words.

    What says nothing but the default is left out: an engine need not know the field then.
    """
    temperature = TEMPERATURE if asked.temperature is None else asked.temperature
    body: dict[str, Any] = {
        "model": model,
        "prompt": asked.prompt,
        "max_tokens": asked.max_new_tokens or MAX_NEW_TOKENS,
        "temperature": temperature,
        "stream": stream,
    }
    neutral = {"top_k": -1, "top_p": 1.0, "include_stop_str_in_output": False}
    for name in _SAME:
        value = getattr(asked, name)
        if value is not None and value != neutral.get(name, 0):
            body[name] = value
    if asked.stop_sequences:
        body["stop"] = asked.stop_sequences
    if asked.return_token_log_probs:
        body["logprobs"] = 1
    if asked.skip_special_tokens is False:
        body["skip_special_tokens"] = False
    for name in _GUIDES:
        if (guide := getattr(asked, name)) is not None:
            body["structured_outputs"] = {name.removeprefix("guided_"): guide}
    if stream:
        # An event may carry several tokens: counting them is the engine's business.
        counted = {"continuous_usage_stats": True} if ours else {}
        body["stream_options"] = {"include_usage": True} | counted
    return body
