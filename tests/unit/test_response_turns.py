"""What becomes of an engine's answer to a response, whole and in events."""

from typing import Any

import orjson
import pytest

from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.api.responses.shown import show
from llm_engine.api.responses.turn import Turn, ended
from llm_engine.errors import InternalError
from tests.stores.making import response

Event = dict[str, Any]

ASKED = EngineRequest(Kind.RESPONSES, "/v1/responses", "m", True, b"", True)


def turn(**request: Any) -> Turn:
    return Turn(response(request=request))


def hear(made: Turn, *events: Event) -> list[Event]:
    """What is told of them."""
    for event in events:
        made.event(ASKED, orjson.dumps(event))
    return [orjson.loads(event) for event in made.take()]


def part(tokens: list[Event] | None = None) -> Event:
    return {"type": "output_text", "text": "a b", "annotations": [], "logprobs": tokens}


def message(content: Event, name: str = "msg_1") -> Event:
    """vLLM takes every item for completed."""
    return {"id": name, "type": "message", "role": "assistant", "status": "completed",
            "content": [content]}  # fmt: skip


def done(item: Event, place: int = 0) -> Event:
    return {"type": "response.output_item.done", "output_index": place, "item": item}


def completed(*output: Event, status: str = "completed") -> Event:
    """How vLLM's streams end, whatever the status."""
    return {"type": "response.completed", "response": {"status": status, "output": output}}


#: What vLLM says where three are asked for: the sampled token first, then the two likeliest.
TOKENS = [
    {
        "token": " res",
        "logprob": -7.156,
        "top_logprobs": [
            {"token": " res", "logprob": -7.156},
            {"token": " at", "logprob": -5.93},
            {"token": " se", "logprob": -5.992},
        ],
    }
]


@pytest.mark.parametrize(("top", "likeliest"), [(2, [" at", " se"]), (1, [" at"]), (None, [])])
def test_top_logprobs_are_the_likeliest_in_order(top: int | None, likeliest: list[str]):
    made, item = turn(top_logprobs=top), message(part(TOKENS))
    text: Event = {"output_index": 0, "content_index": 0, "item_id": "msg_1"}
    told = hear(
        made,
        {"type": "response.output_text.delta", "delta": "a b", "logprobs": TOKENS} | text,
        {"type": "response.output_text.done", "text": "a b", "logprobs": TOKENS} | text,
        {"type": "response.content_part.done", "part": part(TOKENS)} | text,
        done(item),
        completed(item),
    )
    whole = turn(top_logprobs=top)
    whole.answer(ASKED, orjson.dumps(completed(item)["response"]))
    lists = [
        *(event["logprobs"] for event in told[:2]),
        told[2]["part"]["logprobs"],
        *(each["content"][0]["logprobs"] for each in (told[3]["item"], *made.close().output)),
        *(each["content"][0]["logprobs"] for each in whole.close().output),
    ]
    assert len(lists) == 6
    for [token] in lists:
        assert [each["token"] for each in token["top_logprobs"]] == likeliest
    assert show(ended(made.record, made.close(), 1.0))["top_logprobs"] == (top or 0)


#: A call that `max_output_tokens` has cut short, as vLLM tells it.
CUT = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "f",
       "arguments": '{"a', "status": "completed"}  # fmt: skip


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("cut", [message(part(), "msg_2"), CUT], ids=["message", "call"])
def test_an_item_that_was_cut_short_is_incomplete_wherever_it_is_told(cut: Event, streamed: bool):
    made, first = turn(), message(part())
    end = completed(first, cut, status="incomplete")
    added = {"type": "response.output_item.added", "output_index": 1, "item": cut}
    if streamed:
        told = hear(made, done(first), added, done(cut, 1), end)
        assert [event["type"].split(".")[-1] for event in told] == ["done", "added", "done"]
        assert [told[n]["item"]["status"] for n in (0, 2)] == ["completed", "incomplete"]
        told.append(orjson.loads(made.last(ended(made.record, made.close(), 1.0))))
        assert [event["sequence_number"] for event in told] == [0, 1, 2, 3]
        assert told[3]["type"] == "response.incomplete"
    else:
        made.answer(ASKED, orjson.dumps(end["response"]))
    assert [item["status"] for item in made.close().output] == ["completed", "incomplete"]


def test_only_the_end_of_an_item_is_held_back_and_no_longer_than_to_the_next_event():
    made, item = turn(), message(part())
    added = {"type": "response.output_item.added", "output_index": 0, "item": item}
    assert len(hear(made, added)) == 1
    assert hear(made, done(item)) == []
    more = {"type": "response.output_item.added", "output_index": 1, "item": CUT}
    told = hear(made, more)
    assert [event["type"] for event in told] == ["response.output_item.done", more["type"]]
    assert [event["sequence_number"] for event in told] == [1, 2]


def test_an_item_that_had_ended_when_the_engine_failed_is_told_of():
    made, item = turn(), message(part())
    assert hear(made, done(item)) == []
    made.failure(InternalError("It died."))
    [told] = hear(made)
    last = orjson.loads(made.last(ended(made.record, made.close(), 1.0)))
    assert told["item"]["status"] == "completed" and last["type"] == "response.failed"
    assert (told["sequence_number"], last["sequence_number"]) == (0, 1)
    assert [each["status"] for each in made.close().output] == ["completed"]
