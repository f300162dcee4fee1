"""The official `openai` package against the whole system on real vLLM, over a real socket."""

import json
import math

import openai
import pytest
from pydantic import BaseModel

from tests.support.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: openai.OpenAI, **changes):
    defaults = {"model": "demo-chat", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    return client.chat.completions.create(**{**defaults, **changes})


def test_answers_a_question_in_plain_english(cluster: Cluster):
    answer = ask(cluster.openai())
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 3
    assert answer._request_id


def test_streams_the_same_answer(cluster: Cluster):
    chunks = list(ask(cluster.openai(), stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "The capital of France is Paris."
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 3


async def test_async_client(cluster: Cluster):
    async with cluster.async_openai() as client:
        stream = await client.chat.completions.create(
            model="demo-chat", messages=QUESTION, temperature=0, stream=True
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    assert text == "The capital of France is Paris."


def test_stop_n_and_seed(cluster: Cluster):
    client = cluster.openai()
    assert ask(client, stop=" is").choices[0].message.content == "The capital of France"
    varied = [{"role": "user", "content": "Name three fruits."}]
    texts = [c.message.content for c in ask(client, messages=varied, n=4, temperature=1.0).choices]
    assert len(texts) == 4 and all(texts)
    same = [
        ask(client, messages=varied, seed=7, temperature=1.0).choices[0].message.content
        for _ in range(2)
    ]
    assert same[0] == same[1]


def test_logprobs_have_all_that_the_spec_requires(cluster: Cluster):
    answer = ask(cluster.openai(), logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs.refusal is None and "refusal" in logprobs.to_dict()
    assert math.exp(logprobs.content[0].logprob) > 0.5
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    streamed = list(ask(cluster.openai(), logprobs=True, top_logprobs=1, stream=True))
    with_logprobs = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert with_logprobs and all("refusal" in each.to_dict() for each in with_logprobs)


class Capital(BaseModel):
    country: str
    capital: str


def test_json_schema(cluster: Cluster):
    question = [{"role": "user", "content": "Give me the capital of France as JSON."}]
    answer = cluster.openai().chat.completions.parse(
        model="demo-chat", messages=question, response_format=Capital, temperature=0
    )
    assert answer.choices[0].message.parsed == Capital(country="France", capital="Paris")


def test_logit_bias_and_vllm_extras_are_honoured(cluster: Cluster):
    client = cluster.openai()
    first = ask(client, logprobs=True).choices[0].logprobs.content[0]
    with cluster.client() as http:
        body = {"model": "demo-chat", "messages": QUESTION, "temperature": 0, "logprobs": True,
                "return_token_ids": True}  # fmt: skip
        token = http.post("/v1/chat/completions", json=body).json()["choices"][0]["token_ids"][0]
    biased = ask(client, logit_bias={str(token): -100}, logprobs=True).choices[0]
    assert biased.logprobs.content[0].token != first.token
    greedy = ask(client, temperature=2.0, extra_body={"top_k": 1})
    assert greedy.choices[0].message.content == "The capital of France is Paris."


def test_completions(cluster: Cluster):
    client = cluster.openai()
    both = client.completions.create(model="demo-chat", prompt=["One", "Two"], max_tokens=3, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    streamed = client.completions.create(
        model="demo-chat", prompt="One", max_tokens=3, temperature=0, stream=True
    )
    whole = client.completions.create(model="demo-chat", prompt="One", max_tokens=3, temperature=0)
    assert "".join(c.choices[0].text for c in streamed) == whole.choices[0].text


def test_embeddings_put_like_with_like(cluster: Cluster):
    answer = cluster.openai().embeddings.create(
        model="demo-embed",
        input=[
            "What is the capital of France?",
            "Tell me the capital city of France.",
            "What sound does a dog make?",
        ],
    )
    one, same, other = (row.embedding for row in answer.data)
    assert math.isclose(sum(x * x for x in one), 1, rel_tol=1e-2)
    assert dot(one, same) > dot(one, other) + 0.2
    assert answer.usage.prompt_tokens > 10


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_models(cluster: Cluster):
    client = cluster.openai()
    rows = {model.id: model for model in client.models.list()}
    bases = {name for name, row in rows.items() if not hasattr(row, "parent")}  # the others: tuned
    assert bases == {"demo-chat", "demo-embed"}
    assert rows["demo-chat"].max_model_len == 2048
    assert client.models.retrieve("demo-chat").owned_by == "llm-engine"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("org/none:latest")
    assert error.value.code == "model_not_found"


def test_a_prompt_longer_than_the_context(cluster: Cluster):
    long = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError) as error:
        ask(cluster.openai(), messages=long)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "messages"
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"functions": [{"name": "f", "parameters": {}}]}, "functions"),
        ({"modalities": ["audio"]}, None),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(cluster: Cluster, changes, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(cluster.openai(), **changes)
    assert error.value.type == "invalid_request_error" and error.value.code
    if param is not None:
        assert error.value.param == param


def test_a_missing_or_unknown_model(cluster: Cluster):
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(cluster.openai(), model="none")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with cluster.client() as client:
        missing = client.post("/v1/chat/completions", json={"messages": QUESTION})
    assert missing.status_code == 400
    assert missing.json()["error"]["code"] == "missing_required_parameter"


def test_a_wrong_key(cluster: Cluster):
    with pytest.raises(openai.AuthenticationError) as error:
        cluster.openai(api_key="sk-wrong").models.list()
    assert error.value.code == "invalid_api_key"


def test_tools_travel_there_and_back(cluster: Cluster):
    tools = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather in a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                },
            },
        }
    ]
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(cluster.openai(), messages=question, tools=tools, tool_choice="auto")
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_a_stored_chat_is_there_for_every_gateway(cluster: Cluster):
    client = cluster.openai()
    whole = ask(client, store=True, metadata={"test": "stored"}, logprobs=True, top_logprobs=2)
    assert client.chat.completions.retrieve(whole.id).choices == whole.choices
    chunks = list(ask(client, store=True, stream=True, logprobs=True, top_logprobs=2))
    kept = client.chat.completions.retrieve(chunks[0].id)
    assert {chunk.id for chunk in chunks} == {kept.id} and chunks[-1].usage is None
    assert kept.choices[0].message == whole.choices[0].message
    assert kept.choices[0].finish_reason == "stop"
    assert kept.usage.completion_tokens == whole.usage.completion_tokens
    logprobs = zip(kept.choices[0].logprobs.content, whole.choices[0].logprobs.content, strict=True)
    assert all(one.token == other.token for one, other in logprobs)
    found = client.chat.completions.list(metadata={"test": "stored"})
    assert [each.id for each in found] == [whole.id]
    for chat in (whole.id, kept.id):
        assert client.chat.completions.delete(chat).deleted


def test_a_stored_stream_keeps_its_tool_calls(cluster: Cluster):
    function = {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
    client = cluster.openai()
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    first, *_ = ask(
        client, messages=question, tools=[{"type": "function", "function": function}],
        tool_choice="auto", store=True, stream=True,
    )  # fmt: skip
    kept = client.chat.completions.retrieve(first.id)
    [call] = kept.choices[0].message.tool_calls
    assert kept.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )


def test_decisions_have_probabilities_and_are_the_same_each_time(cluster: Cluster):
    questions = {
        "animal": {"type": "choice", "criteria": {"dog": "It barks.", "cat": "It meows."}},
        "size": {"type": "score", "instructions": "How large is it?", "criteria": ["S", "M", "L"]},
        "tame": {"type": "noul", "instructions": "Is it tame?"},
    }
    body = {"model": "demo-chat", "state": "What sound does a dog make?", "questions": questions}
    with cluster.client() as http:
        answers = [http.post("/v1/decisions", json=body).json() for _ in range(3)]
    first = answers[0]["answers"]
    for name, count in (("animal", 2), ("size", 3)):
        found = first[name]["probabilities"].values()
        assert len(found) == count and math.isclose(sum(found), 1, abs_tol=1e-6)
        assert 0 <= first[name]["confidence"] <= 1
    assert first["animal"]["choice"] in ("dog", "cat")
    assert 0 <= first["size"]["score"] <= 2 and 0 <= first["tame"]["noul"] <= 1
    assert answers[0]["usage"]["input_tokens"] > 30 and answers[0]["usage"]["output_tokens"] == 3
    for other in answers[1:]:
        assert flat(other["answers"]) == pytest.approx(flat(first), abs=0.02)


def flat(answers: dict[str, dict[str, object]]) -> list[float]:
    numbers = [answers[name]["probabilities"].values() for name in ("animal", "size")]
    return [float(n) for found in numbers for n in found] + [float(answers["tame"]["noul"])]
