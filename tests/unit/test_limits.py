"""The limits that registered models set, on bodies as callers send them."""

import orjson
import pytest

from llm_engine.api.limits import hold
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import InvalidRequest
from llm_engine.records import ModelRecord

PATHS = {Kind.CHAT: "/v1/chat/completions", Kind.COMPLETIONS: "/v1/completions",
         Kind.EMBEDDINGS: "/v1/embeddings"}  # fmt: skip


def model(name="m", **values):
    return ModelRecord("mdl_1", "o", name, **values)


def request(kind=Kind.CHAT, **body):
    if kind is Kind.CHAT:
        body = {"messages": [{"role": "user", "content": "hi"}]} | body
    return EngineRequest(kind, PATHS[kind], "m", False, orjson.dumps({"model": "m"} | body), False)


def held(asked, *models, **options):
    return orjson.loads(hold(asked, models, **options).body)


def test_without_limits_the_body_stays_as_it_is():
    asked = request()
    assert hold(asked, [model()]) is asked and hold(asked, []) is asked


def test_the_ceiling_is_set_where_none_was_asked_for():
    assert held(request(), model(max_output_token_count=900))["max_tokens"] == 900
    newest = model(max_output_token_count=900, url="https://api.openai.com/v1")
    assert held(request(), newest)["max_completion_tokens"] == 900
    assert "max_tokens" not in held(request(max_completion_tokens=5), newest)


def test_text_completions_keep_their_default_of_16_tokens():
    asked = request(Kind.COMPLETIONS, prompt="hi")
    assert hold(asked, [model(max_output_token_count=900)]) is asked


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_ceiling_is_refused(field):
    limited = model("mine", max_output_token_count=900)
    assert held(request(**{field: 900}), limited)[field] == 900
    with pytest.raises(InvalidRequest, match=r"'mine' answers with at most 900") as refused:
        hold(request(**{field: 901}), [limited])
    assert refused.value.param == field


def test_of_several_on_the_way_the_tightest_counts():
    way = (model("loose", max_output_token_count=2000), model(max_output_token_count=900))
    assert held(request(), *way)["max_tokens"] == held(request(), *way[::-1])["max_tokens"] == 900
    with pytest.raises(InvalidRequest):
        hold(request(max_tokens=1000), way)


def test_a_ceiling_above_the_endpoints_context_is_left_to_the_engine():
    """It would refuse a max_tokens that its whole context cannot hold."""
    asked = request()
    assert hold(asked, [model(max_output_token_count=900)], 512) is asked
    assert held(asked, model(max_output_token_count=900), served_context=8192)["max_tokens"] == 900


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        (request(max_tokens=90), True),
        (request(max_tokens=100), False),
        (request(messages=[{"role": "user", "content": "w" * 700}]), True),
        (request(messages=[{"role": "user", "content": "w" * 900}]), False),
        (request(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:," + "A" * 9000}},
            {"type": "text", "text": "what is it"}]}]), True),
        (request(messages=[{"role": "user", "content": [{"type": "text", "text": "w" * 900}]}]),
         False),
        (request(messages=[{"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": "w" * 900}}]}]), False),
        (request(messages=[{"role": "user", "content": "w", "tool_calls": [1, {}]}]), True),
        (request(messages=[{"role": "user", "content": "w", "tool_calls": 7}]), True),
        (request(Kind.COMPLETIONS, prompt="w" * 900), False),
        (request(Kind.COMPLETIONS, prompt=[1] * 100), True),
        (request(Kind.COMPLETIONS, prompt=[1] * 101), False),
        (request(Kind.COMPLETIONS, prompt=[[1] * 60] * 5), True),
        (request(Kind.EMBEDDINGS, input=["w" * 700] * 50), True),
        (request(Kind.EMBEDDINGS, input=["w", "w" * 900]), False),
        (request(Kind.EMBEDDINGS, input=[[1] * 101]), False),
    ],
)  # fmt: skip
def test_each_prompt_has_the_context_to_itself_and_only_text_counts(asked, fits):
    limited = model(max_token_count=100)
    if fits:
        assert hold(asked, [limited]) is asked
        return
    with pytest.raises(InvalidRequest) as refused:
        hold(asked, [limited])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param in ("messages", "prompt", "input")
