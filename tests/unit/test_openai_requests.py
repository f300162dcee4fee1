"""What is let in on the inference routes, what is refused and how, and what reaches vLLM."""

import json
from typing import Any

import orjson
import pytest

from llm_engine.api.openai.requests import parse
from llm_engine.api.requests import EngineRequest, Kind, rename
from llm_engine.errors import InvalidRequest

HI = [{"role": "user", "content": "hi"}]
MINIMAL: dict[Kind, dict[str, Any]] = {
    Kind.CHAT: {"model": "demo", "messages": HI},
    Kind.COMPLETIONS: {"model": "demo", "prompt": "hi"},
    Kind.EMBEDDINGS: {"model": "demo", "input": "hi"},
    Kind.RESPONSES: {"model": "demo", "input": "hi"},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def body(kind: Kind, **changed: Any) -> bytes:
    return orjson.dumps(MINIMAL[kind] | changed)


def chat(**changed: Any) -> EngineRequest:
    return parse(Kind.CHAT, body(Kind.CHAT, **changed))


def complete(**changed: Any) -> EngineRequest:
    return parse(Kind.COMPLETIONS, body(Kind.COMPLETIONS, **changed))


def refusal(kind: Kind, raw: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, raw)
    error = caught.value
    assert error.status == 400 and error.type == "invalid_request_error"
    assert error.message.endswith((".", "?")) and len(error.message) < 500
    return error


# -- what is not an object of JSON at all


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"model": "demo",\n "temperature": NaN}', "NaN is not a JSON value at line 2"),
        (b'{"temperature": -Infinity}', "Infinity is not a JSON value"),
        (b'{"temperature": 1e999}', "infinity"),
        (b'{"model": "\xff"}', "UTF-8 at byte 11"),
        (b'\xef\xbb\xbf{"model": 1}', "byte order mark"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b"[" * 2000, "depth"),
        (b'{"model": "demo"} x', "after document"),
        (b"[]", "must be a JSON object"),
        (b'"demo"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("kind", Kind)
def test_not_json(kind: Kind, raw: bytes, says: str) -> None:
    assert says in refusal(kind, raw).message


# -- what is wrong in an object

MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
UNSUPPORTED, UNKNOWN = "unsupported_parameter", "unknown_parameter"


def role(**message: Any) -> dict[str, Any]:
    return {"messages": [*HI, message]}


def parts(*given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(given)}]}


def schema(**given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": given}}


BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"model": ""}, "empty_string", "model"),
    ({"model": None}, TYPE, "model"),
    ({"model": "m" * 257}, "string_above_max_length", "model"),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": "hi"}, TYPE, "messages"),
    ({"messages": ["hi"]}, TYPE, "messages[0]"),
    (role(content="x"), MISSING, "messages[1].role"),
    (role(role="wizard", content="x"), VALUE, "messages[1].role"),
    (role(role=5, content="x"), TYPE, "messages[1].role"),
    (role(role="user"), MISSING, "messages[1].content"),
    (role(role="user", content=None), TYPE, "messages[1].content"),
    (role(role="user", content=5), TYPE, "messages[1].content"),
    (role(role="user", content={}), TYPE, "messages[1].content"),
    (role(role="assistant"), MISSING, "messages[1].content"),
    (role(role="assistant", content=None, tool_calls=[]), MISSING, "messages[1].content"),
    (role(role="assistant", tool_calls=[{"id": "a", "type": "function"}]), MISSING,
     "messages[1].tool_calls[0].function"),
    (role(role="assistant", content="x", audio={"id": "a"}), UNSUPPORTED, "messages[1].audio"),
    (role(role="assistant", function_call={"name": "f", "arguments": "{}"}), UNSUPPORTED,
     "messages[1].function_call"),
    (role(role="tool", content="x"), MISSING, "messages[1].tool_call_id"),
    (parts(), "empty_array", "messages[0].content"),
    (parts({"text": "x"}), MISSING, "messages[0].content[0].type"),
    (parts({"type": "text"}), MISSING, "messages[0].content[0].text"),
    (parts({"type": "text", "text": 5}), TYPE, "messages[0].content[0].text"),
    (parts({"type": "file", "file": {}}), VALUE, "messages[0].content[0].type"),
    (parts({"type": "image_url"}), MISSING, "messages[0].content[0].image_url"),
    ({"temperature": 3}, "decimal_above_max_value", "temperature"),
    ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
    ({"temperature": "1"}, TYPE, "temperature"),
    ({"temperature": True}, TYPE, "temperature"),
    ({"top_p": 1.1}, "decimal_above_max_value", "top_p"),
    ({"presence_penalty": 2.5}, "decimal_above_max_value", "presence_penalty"),
    ({"frequency_penalty": -3}, "decimal_below_min_value", "frequency_penalty"),
    ({"n": 0}, "integer_below_min_value", "n"),
    ({"n": 129}, "integer_above_max_value", "n"),
    ({"n": 1.0}, TYPE, "n"),
    ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    ({"stop": ""}, "empty_string", "stop"),
    ({"stop": ["a", ""]}, "empty_string", "stop[1]"),
    ({"stop": 5}, TYPE, "stop"),
    ({"stop": ["a", 5]}, TYPE, "stop[1]"),
    ({"seed": 2**63}, "integer_above_max_value", "seed"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"max_completion_tokens": -1}, "integer_below_min_value", "max_completion_tokens"),
    ({"max_tokens": 1e30}, TYPE, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, VALUE, "max_tokens"),
    ({"logprobs": 2}, TYPE, "logprobs"),
    ({"top_logprobs": 3}, VALUE, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
    ({"logit_bias": {"x": 1}}, VALUE, "logit_bias.x"),
    ({"logit_bias": {"-5": 1}}, VALUE, "logit_bias.-5"),
    ({"logit_bias": {"123": 101}}, "decimal_above_max_value", "logit_bias.123"),
    ({"logit_bias": [1]}, TYPE, "logit_bias"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "object_above_max_properties",
     "logit_bias"),
    ({"metadata": {"a": 5}}, TYPE, "metadata.a"),
    ({"metadata": {"a": "b" * 513}}, "string_above_max_length", "metadata.a"),
    ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "object_above_max_properties",
     "metadata"),
    ({"stream": 1}, TYPE, "stream"),
    ({"stream_options": {"include_usage": True}}, VALUE, "stream_options"),
    ({"stream": True, "stream_options": 5}, TYPE, "stream_options"),
    ({"tools": []}, "empty_array", "tools"),
    ({"tools": [WEATHER] * 129}, "array_above_max_length", "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "unsupported_value",
     "tools[0].type"),
    ({"tools": [{"type": "function"}]}, MISSING, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, VALUE,
     "tools[0].function.name"),
    ({"tool_choice": "auto"}, VALUE, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, VALUE, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": 5}, TYPE, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, VALUE, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {}}}, MISSING,
     "tool_choice.function.name"),
    ({"tools": [WEATHER], "tool_choice": CLOCK}, VALUE, "tool_choice.function.name"),
    ({"response_format": {}}, MISSING, "response_format.type"),
    ({"response_format": {"type": "xml"}}, VALUE, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, MISSING, "response_format.json_schema"),
    (schema(name="x"), MISSING, "response_format.json_schema.schema"),
    (schema(schema={}), MISSING, "response_format.json_schema.name"),
    ({"structured_outputs": 5}, TYPE, "structured_outputs"),
    ({"structured_outputs": {}}, VALUE, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "empty_array", "structured_outputs.choice"),
    ({"reasoning_effort": "extreme"}, VALUE, "reasoning_effort"),
    ({"top_k": -2}, "integer_below_min_value", "top_k"),
    ({"min_p": 2}, "decimal_above_max_value", "min_p"),
    ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
    ({"suppress_tokens": [-1]}, "integer_below_min_value", "suppress_tokens[0]"),
    # accepted by vLLM and ignored: refused
    ({"functions": [{"name": "f"}]}, UNSUPPORTED, "functions"),
    ({"function_call": "auto"}, UNSUPPORTED, "function_call"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, UNSUPPORTED, "audio"),
    ({"modalities": ["text", "audio"]}, "unsupported_value", "modalities[1]"),
    ({"web_search_options": {}}, UNSUPPORTED, "web_search_options"),
    ({"moderation": {"model": "x"}}, UNSUPPORTED, "moderation"),
    ({"store": "yes"}, TYPE, "store"),
    ({"store": True, "metadata": {"a": "\0"}}, VALUE, "metadata"),
    ({"service_tier": "flex"}, "unsupported_value", "service_tier"),
    ({"verbosity": "high"}, "unsupported_value", "verbosity"),
    ({"guided_json": {}}, UNSUPPORTED, "guided_json"),
    ({"return_token_offsets": True}, UNSUPPORTED, "return_token_offsets"),
    # not for the public
    ({"request_id": "x"}, UNSUPPORTED, "request_id"),
    ({"kv_transfer_params": {}}, UNSUPPORTED, "kv_transfer_params"),
    ({"vllm_xargs": {"kv_transfer_params": "x"}}, UNSUPPORTED, "vllm_xargs.kv_transfer_params"),
    # probable mistakes
    ({"temprature": 1}, UNKNOWN, "temprature"),
    ({"max_token": 1}, UNKNOWN, "max_token"),
    ({"maxTokens": 1}, UNKNOWN, "maxTokens"),
    ({"top-p": 1}, UNKNOWN, "top-p"),
    ({"structured_output": {}}, UNKNOWN, "structured_output"),
    ({"prompt": "x"}, UNKNOWN, "prompt"),
    ({"best_of": 2}, UNKNOWN, "best_of"),
]  # fmt: skip


BAD_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "empty_string", "prompt"),
    ({"prompt": None}, TYPE, "prompt"),
    ({"prompt": []}, "empty_array", "prompt"),
    ({"prompt": ["a", ""]}, "empty_string", "prompt[1]"),
    ({"prompt": ["a", 1]}, TYPE, "prompt[1]"),
    ({"prompt": [1, "a"]}, TYPE, "prompt[1]"),
    ({"prompt": [-1]}, "integer_below_min_value", "prompt[0]"),
    ({"prompt": [2**31]}, "integer_above_max_value", "prompt[0]"),
    ({"prompt": [[1], []]}, "empty_array", "prompt[1]"),
    ({"prompt": ["a"] * 1025}, "array_above_max_length", "prompt"),
    ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
    ({"logprobs": True}, TYPE, "logprobs"),
    ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
    ({"best_of": 3}, UNSUPPORTED, "best_of"),
    ({"best_of": 2, "n": 3}, VALUE, "best_of"),
    ({"suffix": "."}, "unsupported_value", "suffix"),
    ({"prompt_embeds": "gASV"}, UNSUPPORTED, "prompt_embeds"),
    ({"messages": HI}, UNKNOWN, "messages"),
    ({"max_completion_tokens": 5}, UNKNOWN, "max_completion_tokens"),
]

BAD_EMBEDDING: list[tuple[dict[str, Any], str, str]] = [
    ({"input": ""}, "empty_string", "input"),
    ({"input": []}, "empty_array", "input"),
    ({"input": ["a", ""]}, "empty_string", "input[1]"),
    ({"input": ["a"] * 2049}, "array_above_max_length", "input"),
    ({"input": {"text": "a"}}, TYPE, "input"),
    ({"input": [{"role": "user", "content": "a"}]}, TYPE, "input[0]"),
    ({"encoding_format": "bytes"}, VALUE, "encoding_format"),
    ({"dimensions": 0}, "integer_below_min_value", "dimensions"),
    ({"dimension": 8}, UNKNOWN, "dimension"),
    ({"temperature": 1}, UNKNOWN, "temperature"),
]


@pytest.mark.parametrize(
    ("kind", "changed", "code", "param"),
    [
        *((Kind.CHAT, *case) for case in BAD_CHAT),
        *((Kind.COMPLETIONS, *case) for case in BAD_COMPLETION),
        *((Kind.EMBEDDINGS, *case) for case in BAD_EMBEDDING),
    ],
)
def test_refused(kind: Kind, changed: dict[str, Any], code: str, param: str) -> None:
    error = refusal(kind, body(kind, **changed))
    assert (error.code, error.param) == (code, param), error.message
    assert param.split("[")[0].split(".")[0] in error.message


@pytest.mark.parametrize("kind", Kind)
def test_required_fields(kind: Kind) -> None:
    for field in MINIMAL[kind]:
        rest = {key: value for key, value in MINIMAL[kind].items() if key != field}
        error = refusal(kind, orjson.dumps(rest))
        assert (error.code, error.param) == (MISSING, field)
        assert error.message == f"Missing required parameter: '{field}'."


WORDING = [
    ({"temperature": 3}, "Invalid 'temperature': decimal above maximum value. "
     "Expected a value <= 2, but got 3 instead."),
    ({"stop": ["a"] * 5}, "Invalid 'stop': array too long. Expected an array with maximum "
     "length 4, but got an array with length 5 instead."),
    ({"messages": []}, "Invalid 'messages': empty array. Expected an array with minimum length 1, "
     "but got an empty array instead."),
    ({"messages": [{"role": "user", "content": 5}]}, "Invalid type for 'messages[0].content': "
     "expected one of a string or an array, but got an integer instead."),
    ({"verbosity": "high"}, "Unsupported value: 'verbosity' does not support 'high' here. "
     "Supported values are: 'medium'."),
    ({"temprature": 1}, "Unknown parameter: 'temprature'. Did you mean 'temperature'?"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), WORDING)
def test_wording(changed: dict[str, Any], message: str) -> None:
    assert refusal(Kind.CHAT, body(Kind.CHAT, **changed)).message == message


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [{"role": "x" * 10**5, "content": ""}]},
        {"temperature": "9" * 10**5},
        {"tool_choice": "y" * 10**5, "tools": [WEATHER]},
        {"logit_bias": {"k" * 10**5: 1}},
        {"metadata": {str(i): i for i in range(10**5)}},
        {"stop": [5] * 10**5},
        {"temperature_" + "z" * 10**5: 5, "n": 0},
        {f"field{i}": i for i in range(10**4)},
    ],
)
def test_long_values_are_not_echoed(changed: dict[str, Any]) -> None:
    error = refusal(Kind.CHAT, body(Kind.CHAT, **changed))
    assert len(error.param or "") < 200


# -- what is let in

GOOD_CHAT: list[dict[str, Any]] = [
    {},
    {"temperature": 0, "top_p": 1, "n": 1, "max_tokens": 2**40, "seed": -(2**63)},
    {"temperature": 2.0, "presence_penalty": -2, "frequency_penalty": 2, "stop": "\n"},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"max_tokens": 5, "max_completion_tokens": 5},
    {"stop": ["a", "b", "c", "d"], "logit_bias": {"50256": -100, "1": 1.5}},
    {"logprobs": True, "top_logprobs": 0},
    {"logprobs": True, "top_logprobs": 20},
    {"top_logprobs": 0},
    {"tools": [WEATHER, CLOCK], "tool_choice": CLOCK, "parallel_tool_calls": False},
    {"tools": [WEATHER], "tool_choice": "required"},
    {"tool_choice": "none"},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "structural_tag", "format": {}}},
    schema(name="x", strict=True, schema={"type": "object"}),
    # hints and labels
    {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
    {"service_tier": "auto", "store": False, "modalities": ["text"], "verbosity": "medium"},
    {"prediction": {"type": "content", "content": "x"}, "prompt_cache_retention": "24h"},
    # vLLM's own, and what only another engine may know
    {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True},
    {"structured_outputs": {"choice": ["yes", "no"]}, "chat_template_kwargs": {"a": 1}},
    {"cache_salt": "x", "priority": 3, "vllm_xargs": {"ngram_size": 3}, "echo": True},
    {"mirostat": 2, "typical_p": 0.5},
    # what clients send back to us
    role(role="assistant", content="x", refusal=None, annotations=[], audio=None,
         function_call=None, tool_calls=None),
    role(role="assistant", content=None, tool_calls=[
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]),
    role(role="tool", tool_call_id="a", content=[{"type": "text", "text": ""}]),
    role(role="developer", content="Be brief."),
    role(role="function", name="f", content=None),
    role(role="assistant", content=None, refusal="no"),
    parts({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}),
    # null is "not given"
    dict.fromkeys(
        ["temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "max_tokens",
         "max_completion_tokens", "logprobs", "top_logprobs", "logit_bias", "tools",
         "tool_choice", "response_format", "functions", "function_call", "audio", "modalities",
         "store", "metadata", "service_tier", "reasoning_effort", "temprature"]),
]  # fmt: skip

GOOD_COMPLETION: list[dict[str, Any]] = [
    {},
    {"prompt": ["a", "b"]},
    {"prompt": [1, 2]},
    {"prompt": [[1], [2, 3]]},
    {"echo": True, "logprobs": 5, "max_tokens": 0},
    {"n": 2, "best_of": 2, "suffix": "", "user": "u"},
    {"stream": True, "logprobs": 0},
    {"best_of": None, "suffix": None, "echo": None},
]

GOOD_EMBEDDING: list[dict[str, Any]] = [
    {},
    {"input": ["a"] * 2048, "encoding_format": "base64", "dimensions": 8},
    {"input": [1, 2], "user": "u", "truncate_prompt_tokens": 5},
    {"input": [[1], [2]], "encoding_format": None},
]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        *((Kind.CHAT, case) for case in GOOD_CHAT),
        *((Kind.COMPLETIONS, case) for case in GOOD_COMPLETION),
        *((Kind.EMBEDDINGS, case) for case in GOOD_EMBEDDING),
    ],
)
def test_passes_unchanged(kind: Kind, changed: dict[str, Any]) -> None:
    raw = body(kind, **changed)
    request = parse(kind, raw)
    assert request.body is raw
    assert (request.kind, request.model) == (kind, "demo")
    assert request.path == "/v1/" + kind.replace(".", "/")
    assert request.stream is bool(changed.get("stream"))


@pytest.mark.parametrize(
    ("changed", "sent"),
    [
        ({"top_p": 0}, {"top_p": 1, "temperature": 1, "top_k": 1}),
        ({"temperature": 0, "n": 2}, {"top_p": 1, "temperature": 1, "top_k": 1, "n": 2}),
        (
            {"suppress_tokens": [5], "logit_bias": {"5": 1, "6": 2}},
            {"logit_bias": {"5": -100, "6": 2}},
        ),
        ({"suppress_tokens": None}, {}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 3}),
        (
            {
                "tools": [WEATHER, CLOCK],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [CLOCK]},
                },
            },
            {"tools": [CLOCK], "tool_choice": "required"},
        ),
        ({"store": True, "metadata": {"a": "b"}}, {}),
    ],
)
def test_put_into_vllms_words(changed: dict[str, Any], sent: dict[str, Any]) -> None:
    request = chat(**changed)
    assert orjson.loads(request.body) == MINIMAL[Kind.CHAT] | sent
    assert request.store is ("store" in changed)


def test_null_n_is_left_out_of_completions() -> None:
    assert orjson.loads(complete(n=None).body) == MINIMAL[Kind.COMPLETIONS]


@pytest.mark.parametrize(
    ("request_", "rewrite"),
    [
        (chat(), True),
        (chat(stream=True), False),
        (chat(stream=True, logprobs=True), True),
        (chat(stream=True, tools=[WEATHER]), True),
        (chat(stream=True, stream_options={"include_usage": True}), False),
        (chat(stream=True, stream_options={"include_obfuscation": True}), True),
        (complete(), True),
        (complete(stream=True, logprobs=2), False),
        (parse(Kind.EMBEDDINGS, body(Kind.EMBEDDINGS)), False),
    ],
)
def test_which_answers_need_care(request_: EngineRequest, rewrite: bool) -> None:
    assert request_.rewrite is rewrite


def test_choices_count_every_prompt() -> None:
    assert chat(n=3).choices == 3
    assert complete(prompt=["a", "b"], n=2).choices == 4
    assert complete(prompt=[1, 2, 3]).choices == 1
    assert complete(prompt=[[1], [2]]).choices == 2


def test_rename() -> None:
    renamed = rename(chat(seed=5), "demo-v2", "shown")
    assert renamed.shown == "shown" and renamed.rewrite
    assert renamed.model == "demo-v2"
    assert orjson.loads(renamed.body) == {"model": "demo-v2", "messages": HI, "seed": 5}


def test_what_could_not_be_sent_on_is_refused_at_once():
    """As JSON, 1,000 levels can be read and 250 written."""
    deep: Any = []
    for _ in range(250):
        deep = [deep]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for extra in ({"chat_template_kwargs": {"a": deep}}, {"of_an_engine": deep}):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            parse(Kind.CHAT, orjson.dumps(body)[:-1] + b"," + written(extra)[1:])


def written(value: Any) -> bytes:
    return json.dumps(value).encode()
