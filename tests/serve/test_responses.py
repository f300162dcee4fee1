"""Responses and conversations on real vLLM behind two gateways, with the official package."""

import json
import time
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> OpenAI:
    return cluster.openai()


def say(client: OpenAI, said: Any = "What is the capital of France?", **asked: Any) -> Any:
    defaults = {"model": "demo-chat", "input": said, "temperature": 0, "max_output_tokens": 40}
    return client.responses.create(**defaults | asked)


def test_answers_and_keeps_the_answer(client: OpenAI):
    made = say(client, metadata={"a": "b"})
    assert (made.output_text, made.status) == (PARIS, "completed")
    assert made.usage.input_tokens > 5 and made.usage.output_tokens > 3
    assert (made.temperature, made.top_p) == (0, 1)
    for _ in range(8):  # whichever gateway is asked
        assert client.responses.retrieve(made.id) == made


def test_a_stream_is_what_the_helper_expects(client: OpenAI):
    with client.responses.stream(
        model="demo-chat", input="What is the capital of France?", temperature=0
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == PARIS
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == PARIS and events[-1].type == "response.completed"
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events)))
    assert client.responses.retrieve(final.id).output_text == PARIS


def test_it_ends_where_its_tokens_do(client: OpenAI):
    for stream in (False, True):
        made = say(client, max_output_tokens=2, stream=stream)
        if stream:
            last = list(made)[-1]
            assert last.type == "response.incomplete"
            made = last.response
        assert made.status == "incomplete"
        assert made.incomplete_details.reason == "max_output_tokens"
        assert made.output[-1].status == "incomplete"
        assert made.usage.output_tokens == 2


def test_a_chain_remembers_and_its_beginning_is_in_the_cache(client: OpenAI):
    long = "Please remember this list of words. " + "apple river stone cloud " * 30
    first = say(client, long, max_output_tokens=8)
    second = say(client, "What is the capital of France?", previous_response_id=first.id)
    third = say(client, "And what is the capital of Spain?", previous_response_id=second.id)
    assert first.usage.input_tokens < second.usage.input_tokens < third.usage.input_tokens
    # Both went to the replica that had the first one.
    assert second.usage.input_tokens_details.cached_tokens > 64
    assert third.usage.input_tokens_details.cached_tokens > 64


def test_a_conversation_grows(client: OpenAI):
    talk = client.conversations.create()
    one = say(client, conversation=talk.id)
    two = say(client, "Thank you.", conversation=talk.id)
    assert two.usage.input_tokens > one.usage.input_tokens
    said = [item.role for item in client.conversations.items.list(talk.id, order="asc")]
    assert said == ["user", "assistant", "user", "assistant"]


class Capital(BaseModel):
    country: str
    capital: str


def test_structured_text(client: OpenAI):
    made = client.responses.parse(
        model="demo-chat", input="Give me the capital of France as JSON.", text_format=Capital,
        temperature=0,
    )  # fmt: skip
    assert made.output_parsed == Capital(country="France", capital="Paris")


TOOL = {
    "type": "function", "name": "get_weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]},
}  # fmt: skip


def test_functions_are_called_and_their_outputs_read(client: OpenAI):
    asked = "What is the weather in Paris?"
    first = say(client, asked, tools=[TOOL], tool_choice="required")
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather" and "city" in json.loads(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = say(client, [output], previous_response_id=first.id, tools=[TOOL])
    assert second.status == "completed" and second.output
    streamed = list(say(client, asked, tools=[TOOL], tool_choice="required", stream=True))
    kinds = {event.type for event in streamed}
    assert "response.function_call_arguments.done" in kinds
    assert streamed[-1].response.output[0].type == "function_call"


def test_in_the_background_from_any_gateway(client: OpenAI):
    made = [say(client, background=True).id for _ in range(20)]

    def ended(response: str) -> Any:
        found = client.responses.retrieve(response)
        return found.status not in ("queued", "in_progress") and found

    for response in made:
        assert eventually(lambda r=response: ended(r), 30, 0.05).output_text == PARIS


def test_a_background_stream_is_taken_up_anywhere(client: OpenAI):
    events = list(say(client, background=True, stream=True))
    assert events[-1].type == "response.completed"
    name = events[0].response.id
    for after in (0, 3, 9):
        again = list(client.responses.retrieve(name, stream=True, starting_after=after))
        assert again == events[after + 1 :]


def test_cancelled_within_a_second(client: OpenAI, cluster: Cluster):
    asked = {"background": True, "max_output_tokens": 1900, "extra_body": {"ignore_eos": True}}
    made = say(client, **asked)
    began = time.monotonic()
    assert client.responses.cancel(made.id).status in ("cancelled", "completed")
    assert time.monotonic() - began < 4, "so long it takes by itself"


def test_what_only_the_engine_can_refuse_is_the_callers_mistake(client: OpenAI):
    """vLLM has begun its stream when it notices."""
    wrong = {"logit_bias": {"999999": 1}}
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="logit_bias"):
            say(client, stream=stream, extra_body=wrong)
    made = say(client, background=True, extra_body=wrong)
    ended = eventually(lambda: (r := client.responses.retrieve(made.id)).error and r, 20)
    assert (ended.status, ended.error.code) == ("failed", "invalid_prompt")
    assert "logit_bias" in ended.error.message


def test_tokens_are_counted(client: OpenAI):
    counted = client.responses.input_tokens.count(
        model="demo-chat", input="What is the capital of France?"
    )
    assert counted.input_tokens == say(client).usage.input_tokens


def test_too_long_for_the_model(client: OpenAI):
    made = say(client, "word " * 5000, background=True)

    def failed() -> Any:
        found = client.responses.retrieve(made.id)
        return found.status == "failed" and found

    error = eventually(failed, 20, 0.1).error
    assert error.code == "invalid_prompt" and "context" in error.message
