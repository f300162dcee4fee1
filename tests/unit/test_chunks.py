"""Chunks of a streamed chat completion, put together."""

from typing import Any

import pytest

from llm_engine.api.openai.chunks import Chunks

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "m"}


def whole(*chunks: dict[str, Any]) -> dict[str, Any]:
    found = Chunks()
    for chunk in chunks:
        found.add(HEAD | chunk)
    return found.whole()


def piece(delta: dict[str, Any], index: int = 0, **facts: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": None, **facts}]}


def test_texts_of_several_choices_and_what_was_used():
    found = whole(
        piece({"role": "assistant", "content": ""}, obfuscation="x"),
        piece({"role": "assistant", "content": ""}, 1),
        piece({"content": "a"}) | {"obfuscation": "xyz"},
        piece({"content": "x"}, 1, finish_reason="length"),
        piece({"content": "b"}) | {"usage": None},
        piece({}, finish_reason="stop", stop_reason=5),
        {"choices": [], "usage": {"total_tokens": 3}},
    )
    assert {key: found[key] for key in HEAD} == HEAD | {"object": "chat.completion"}
    assert "obfuscation" not in found and found["usage"] == {"total_tokens": 3}
    first, second = found["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["message"] == {"role": "assistant", "content": "ab"}
    assert (first["finish_reason"], first["stop_reason"], first["logprobs"]) == ("stop", 5, None)
    assert (second["message"]["content"], second["finish_reason"]) == ("x", "length")


def test_tool_calls_reasoning_and_refusals():
    def call(index: int, **facts: Any) -> dict[str, Any]:
        return piece({"tool_calls": [{"index": index, **facts}]})

    found = whole(
        piece({"role": "assistant", "content": None}),
        piece({"reasoning": "hm"}),
        piece({"reasoning": "m."}),
        call(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        call(0, function={"arguments": '{"x"'}),
        call(1, id="b", type="function", function={"name": "g"}),
        call(0, id=None, function={"name": None, "arguments": ": 1}"}),
        piece({"refusal": "no"}),
        piece({}, finish_reason="tool_calls"),
    )
    message = found["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["refusal"]) == (None, "hmm.", "no")
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]


def test_calls_without_an_index_are_whole_ones():
    calls = [{"id": each, "function": {"name": each, "arguments": "{}"}} for each in "ab"]
    found = whole(*(piece({"tool_calls": [each]}) for each in calls))
    told = found["choices"][0]["message"]["tool_calls"]
    assert [(each["id"], each["function"]["name"]) for each in told] == [("a", "a"), ("b", "b")]


def test_logprobs_and_token_ids_grow():
    found = whole(
        piece({"content": "a"}, logprobs={"content": [{"token": "a"}]}, token_ids=[1]),
        piece({"content": "b"}, logprobs={"content": [{"token": "b"}], "refusal": None}),
        piece({}, logprobs=None, token_ids=[2, 3]),
    )
    choice = found["choices"][0]
    assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}], "refusal": None}
    assert choice["token_ids"] == [1, 2, 3]


@pytest.mark.parametrize("chunk", [{}, {"choices": None}, {"choices": [{}]}, {"choices": [1]}])
def test_what_is_no_chunk_is_found_out(chunk):
    with pytest.raises((KeyError, TypeError, AttributeError)):
        whole(chunk)
