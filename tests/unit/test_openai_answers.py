"""vLLM 0.32's answers (captured) against OpenAI's types, and its errors in OpenAI's words."""

from dataclasses import replace
from typing import Any

import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llm_engine.api.openai.answers import engine_error, rewrite_answer, rewrite_event
from llm_engine.api.openai.requests import parse
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

MESSAGES = [{"role": "user", "content": "hi"}]


def ask_chat(**fields: Any) -> EngineRequest:
    return parse(Kind.CHAT, orjson.dumps({"model": "demo", "messages": MESSAGES} | fields))


def ask_completion(**fields: Any) -> EngineRequest:
    return parse(Kind.COMPLETIONS, orjson.dumps({"model": "demo", "prompt": "hi"} | fields))


def ask_embedding() -> EngineRequest:
    return parse(Kind.EMBEDDINGS, b'{"model": "demo", "input": "hi"}')


# -- captured answers

CHAT = b"""{"id":"chatcmpl-a2be2c9aafec43f1","object":"chat.completion","created":1795243538,
"model":"demo","choices":[{"index":0,"message":{"role":"assistant","content":" v mult [fe",
"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},
"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,
"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-3549d9af",
"usage":{"prompt_tokens":13,"total_tokens":17,"completion_tokens":4,
"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,
"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,
"ec_transfer_params":null,"metrics":null}"""

TOOLS = b"""{"id":"chatcmpl-afd5d7ed2b9f5762","object":"chat.completion","created":1795243844,
"model":"demo","choices":[{"index":0,"message":{"role":"assistant","content":"",
"refusal":null,"annotations":null,"audio":null,"function_call":null,
"tool_calls":[{"id":"chatcmpl-tool-b60a70fa8321e926","type":"function",
"function":{"name":"get_weather","arguments":"{}"}}],"reasoning":null},"logprobs":null,
"finish_reason":"tool_calls","stop_reason":null,"token_ids":null,"routed_experts":null}],
"service_tier":null,"system_fingerprint":"vllm-0.32.0-3549d9af","usage":{"prompt_tokens":99,
"total_tokens":152,"completion_tokens":53,"prompt_tokens_details":{"cached_tokens":16},
"completion_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}"""

#: What vLLM says to top_logprobs 2: the sampled token first, then only one of the two likeliest.
LOGPROBS = b"""{"content":[{"token":" res","logprob":-7.156,"bytes":[32,114,101,115],
"top_logprobs":[{"token":" res","logprob":-7.156,"bytes":[32,114,101,115]},
{"token":" at","logprob":-5.93,"bytes":[32,97,116]},
{"token":" se","logprob":-5.992,"bytes":[32,115,101]}]}]}"""

COMPLETION = b"""{"id":"cmpl-9ed8805853a23c07","object":"text_completion","created":1795243542,
"model":"demo","choices":[{"index":0,"text":"oprain","logprobs":{"text_offset":[0],
"token_logprobs":[-6.92],"tokens":["EA"],"top_logprobs":[{"EA":-6.92,"models":-5.77}]},
"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,
"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,
"system_fingerprint":"vllm-0.32.0-3549d9af","usage":{"prompt_tokens":2,"total_tokens":6,
"completion_tokens":4,"prompt_tokens_details":null,"completion_tokens_details":null},
"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"""

_CHUNK = b'{"id":"chatcmpl-a","object":"chat.completion.chunk","created":1795243538,"model":"demo",'
CHUNKS = [
    _CHUNK + rest
    for rest in (
        b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}',
        b'"choices":[{"index":0,"delta":{"content":" on"},"logprobs":null,"finish_reason":null,'
        b'"token_ids":null}]}',
        b'"choices":[{"index":0,"delta":{"content":"cy"},"logprobs":' + LOGPROBS + b","
        b'"finish_reason":"length","stop_reason":null,"token_ids":null}],'
        b'"system_fingerprint":"vllm-0.32.0-3549d9af"}',
        b'"choices":[{"index":0,"delta":{"content":null,"tool_calls":[{"id":"chatcmpl-tool-8",'
        b'"type":"function","index":0,"function":{"name":"get_weather"}}]},"logprobs":null,'
        b'"finish_reason":null,"token_ids":null}]}',
        b'"choices":[{"index":0,"delta":{"content":null,"tool_calls":[{"index":0,'
        b'"function":{"arguments":"{}"}}]},"logprobs":null,"finish_reason":null}]}',
        b'"choices":[],"usage":{"prompt_tokens":13,"total_tokens":17,"completion_tokens":4},'
        b'"system_fingerprint":"vllm-0.32.0-3549d9af"}',
    )
]
FIRST, TEXT, WITH_LOGPROBS, TOOL_NAME, TOOL_ARGUMENTS, USAGE = CHUNKS


def answer(request: EngineRequest, body: bytes) -> dict[str, Any]:
    """Rewritten, and held against the official client's types in strict mode."""
    rewritten = rewrite_answer(request, body)
    shape = ChatCompletion if request.kind is Kind.CHAT else Completion
    shape.model_validate_json(rewritten, strict=True)
    result: dict[str, Any] = orjson.loads(rewritten)
    return result


def event(request: EngineRequest, payload: bytes) -> dict[str, Any]:
    rewritten = rewrite_event(request, payload)
    ChatCompletionChunk.model_validate_json(rewritten, strict=True)
    result: dict[str, Any] = orjson.loads(rewritten)
    return result


# -- whole answers


def test_chat_has_openais_keys_and_no_clutter() -> None:
    assert answer(ask_chat(), CHAT) == {
        "id": "chatcmpl-a2be2c9aafec43f1",
        "object": "chat.completion",
        "created": 1795243538,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": " v mult [fe",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "system_fingerprint": "vllm-0.32.0-3549d9af",
        "usage": {"prompt_tokens": 13, "total_tokens": 17, "completion_tokens": 4},
    }


def test_tool_calls_come_with_null_content_and_usage_keeps_its_details() -> None:
    result = answer(ask_chat(), TOOLS)
    message = result["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert result["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_completion() -> None:
    choice = answer(ask_completion(logprobs=1), COMPLETION)["choices"][0]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert choice["logprobs"]["top_logprobs"] == [{"EA": -6.92, "models": -5.77}]


@pytest.mark.parametrize(("top", "tokens"), [(2, [" at", " se"]), (1, [" at"]), (0, [])])
def test_top_logprobs_are_the_likeliest_in_order(top: int, tokens: list[str]) -> None:
    body = CHAT.replace(b'"logprobs":null', b'"logprobs":' + LOGPROBS)
    request = ask_chat(logprobs=True, top_logprobs=top)
    logprobs = answer(request, body)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [item["token"] for item in logprobs["content"][0]["top_logprobs"]] == tokens


def test_chosen_label_logprobs_are_left_alone() -> None:
    body = CHAT.replace(b'"logprobs":null', b'"logprobs":' + LOGPROBS)
    request = ask_chat(logprobs=True, logprob_token_ids=[5, 6])
    logprobs = answer(request, body)["choices"][0]["logprobs"]
    assert len(logprobs["content"][0]["top_logprobs"]) == 3


@pytest.mark.parametrize(
    ("reason", "becomes"), [("stop", "stop"), ("tool_calls", "tool_calls"), ("repetition", "stop")]
)
def test_finish_reason(reason: str, becomes: str) -> None:
    body = CHAT.replace(b'"length"', f'"{reason}"'.encode())
    assert answer(ask_chat(), body)["choices"][0]["finish_reason"] == becomes


@pytest.mark.parametrize("reason", [b'"abort"', b'"error"'])
def test_an_engine_that_gave_up_gave_no_answer(reason: bytes) -> None:
    with pytest.raises(InternalError) as caught:
        rewrite_answer(ask_chat(), CHAT.replace(b'"length"', reason))
    assert caught.value.code == "generation_interrupted"
    error = orjson.loads(rewrite_event(ask_chat(), WITH_LOGPROBS.replace(b'"length"', reason)))
    assert error["error"]["code"] == "generation_interrupted"


def test_the_answers_role_is_always_assistant() -> None:
    body = CHAT.replace(b'"role":"assistant"', b'"role":"user"')
    assert answer(ask_chat(), body)["choices"][0]["message"]["role"] == "assistant"
    chunk = FIRST.replace(b'"role":"assistant"', b'"role":"user"')
    assert event(ask_chat(), chunk)["choices"][0]["delta"]["role"] == "assistant"


# -- streams


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_keep_to_openais_types(chunk: bytes) -> None:
    request = ask_chat(stream=True, logprobs=True, top_logprobs=2)
    result = event(request, chunk)
    assert "token_ids" not in orjson.dumps(result).decode()


@pytest.mark.parametrize("chunk", [FIRST, TEXT, USAGE])
def test_plain_chunks_need_no_rewriting(chunk: bytes) -> None:
    """Why a plain stream is relayed byte for byte."""
    assert not ask_chat(stream=True).rewrite
    ChatCompletionChunk.model_validate_json(chunk, strict=True)


def test_stream_logprobs() -> None:
    request = ask_chat(stream=True, logprobs=True, top_logprobs=1)
    logprobs = event(request, WITH_LOGPROBS)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [item["token"] for item in logprobs["content"][0]["top_logprobs"]] == [" at"]


def test_first_piece_of_a_tool_call_has_arguments_to_add_to() -> None:
    request = ask_chat(stream=True)
    arguments = ""
    for chunk in (TOOL_NAME, TOOL_ARGUMENTS):
        delta = event(request, chunk)["choices"][0]["delta"]
        arguments += delta["tool_calls"][0]["function"]["arguments"]
    assert arguments == "{}"


def test_obfuscated_events_do_not_tell_their_length() -> None:
    request = ask_chat(stream=True, stream_options={"include_obfuscation": True})
    sizes = set()
    for length in range(20):
        chunk = TEXT.replace(b" on", b"x" * length)
        sizes.add(len(rewrite_event(request, chunk)))
        assert "obfuscation" in event(request, chunk)
    assert len(sizes) <= 2 and all(size % 32 == 0 for size in sizes)


# -- errors


def told(message: str, code: int, kind: str = "BadRequestError", param: str | None = None) -> bytes:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": error})


LONG = (
    "This model's maximum context length is 1024 tokens. However, your prompt contains at least "
    "1025 input tokens, which exceeds this limit even without any output tokens. Please reduce "
    "the length of the input prompt. (parameter=input_tokens, value=1025)"
)
PYDANTIC = """11 validation errors:
  {'type': 'literal_error', 'loc': 'body.embed_dtype', 'msg': "Input should be 'float32'", \
'input': 'wat', 'ctx': {'expected': "'float32'"}}
  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict>'}"""
PYDANTIC_OF_PARTS = """8 validation errors for ValidatorIterator
0.ChatCompletionContentPartTextParam.text
  Field required [type=missing, input_value={'type': 'wat', 'x': {}}, input_type=dict]"""
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@pytest.mark.parametrize(
    ("request_", "body", "wanted"),
    [
        (ask_chat(), told(LONG, 400), (400, "context_length_exceeded", "messages")),
        (ask_completion(), told(LONG, 400), (400, "context_length_exceeded", "prompt")),
        (ask_embedding(), told(LONG, 400), (400, "context_length_exceeded", "input")),
        (
            ask_chat(),
            told("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", 400),
            (400, "context_length_exceeded", "messages"),
        ),
        (
            ask_chat(),
            told(
                "max_completion_tokens=5000 cannot be greater than max_model_len=1024. Please "
                "request fewer output tokens. (parameter=max_completion_tokens, value=5000)",
                400,
                param="max_completion_tokens",
            ),
            (400, "invalid_value", "max_completion_tokens"),
        ),
        (
            ask_chat(),
            told("The model `nope` does not exist. Valid aliases: demo.", 404, "NotFoundError"),
            (404, "model_not_found", "model"),
        ),
        (
            ask_chat(),
            told("min_tokens must be less than or equal to max_tokens=4, got 10.", 400),
            (400, "invalid_value", "min_tokens"),
        ),
        (
            ask_chat(),
            told("Grammar error: Invalid type: wat", 400),
            (400, "invalid_value", "structured_outputs"),
        ),
        (
            ask_chat(response_format={"type": "json_object"}),
            told("Grammar error: Invalid type: wat", 400),
            (400, "invalid_value", "response_format"),
        ),
        (
            ask_chat(),
            told("demo is not a multimodal model", 400),
            (400, "invalid_value", "messages"),
        ),
        (
            ask_completion(),
            told("Token id 99999 is out of vocabulary", 400),
            (400, "invalid_value", "prompt"),
        ),
        (
            ask_embedding(),
            told(PYDANTIC, 400, "Bad Request", "body.embed_dtype"),
            (400, "invalid_value", "embed_dtype"),
        ),
        (ask_chat(), told(PYDANTIC_OF_PARTS, 400), (400, "invalid_value", None)),
        (ask_chat(), told("'int' object is not iterable", 400), (400, None, None)),
        (ask_chat(), told("no such image", 422, param="messages"), (400, "invalid_value",
         "messages")),
        (ask_chat(), told(DEAD, 500, "InternalServerError"), (503, "model_not_ready", "model")),
        (ask_chat(), told("boom", 500, "InternalServerError"), (500, None, None)),
        (
            ask_chat(),
            told("The engine is currently busy", 503, "Service Unavailable"),
            (429, "rate_limit_exceeded", "model"),
        ),
        (
            ask_chat(),
            told("Request failed; please retry", 503, "ServiceUnavailableError"),
            (503, "model_not_ready", "model"),
        ),
    ],
)  # fmt: skip
def test_engine_error(request_: EngineRequest, body: bytes, wanted: tuple[Any, ...]) -> None:
    status = orjson.loads(body)["error"]["code"]
    error = engine_error(status, body, request_)
    assert (error.status, error.code, error.param) == wanted
    for leak in ("parameter=", "'msg'", "ValidatorIterator", "EngineCore", "aliases", "object is"):
        assert leak not in error.message
    assert error.message


def test_context_length_message() -> None:
    error = engine_error(400, told(LONG, 400), ask_chat())
    assert error.message == LONG.removesuffix(" (parameter=input_tokens, value=1025)")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, b'{"detail":"Not Found"}', InvalidRequest),
        (403, b'{"error":"this port is private to llm-engine"}', EngineFailed),
        (500, b"Internal Server Error", EngineFailed),
        (502, b"", EngineFailed),
        (503, b"", Overloaded),
        (400, b"[]", InvalidRequest),
        (501, told("no beam search", 501, "NotImplementedError"), InvalidRequest),
        (404, told("The model `x` does not exist.", 404, "NotFoundError"), NotFound),
    ],
)
def test_engine_error_of_any_body(status: int, body: bytes, kind: type[APIError]) -> None:
    assert type(engine_error(status, body, ask_chat())) is kind


def test_an_error_inside_a_stream_brings_its_own_status() -> None:
    error = engine_error(500, told(LONG, 400), ask_chat())
    assert (error.status, error.code) == (400, "context_length_exceeded")


def test_retry_after() -> None:
    busy = engine_error(503, told("queue full", 503), ask_chat())
    dead = engine_error(500, told(DEAD, 500), ask_chat())
    assert isinstance(busy, Overloaded) and busy.retry_after == 1
    assert isinstance(dead, EngineFailed)
    assert (dead.status, dead.code, dead.retry_after) == (503, "model_not_ready", 1)


@pytest.mark.parametrize(
    ("problem", "error", "code"),
    [
        (AdapterProblem.MISSING, NotFound, "model_not_found"),
        (AdapterProblem.BROKEN, InternalError, "adapter_broken"),
        (AdapterProblem.STORAGE, StorageUnavailable, "storage_unavailable"),
        (AdapterProblem.ELSEWHERE, Unavailable, "adapter_elsewhere"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_told_under_its_name(
    problem: AdapterProblem, error: type[APIError], code: str
) -> None:
    told = {"message": "why", "type": problem, "code": problem.status}
    asked = replace(ask_chat(), model="adapter-0", shown="ft:m:me::1", adapter="adapter-0")
    found = engine_error(problem.status, orjson.dumps({"error": told}), asked)
    assert type(found) is error and found.code == code
    assert "ft:m:me::1" in found.message and "adapter-0" not in found.message
    assert error is NotFound or "why" in found.message
