"""What sference's clients are shown, checked by their own models."""

from typing import Any

import pytest
from sference_sdk.models import Response, StreamInferenceCompletionEvent

from llm_engine.api.sference import shown
from llm_engine.responses import FeedEntry, ResponseRecord, Stream, StreamCounts
from llm_engine.statuses import ResponseState, StreamState

MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "Paris", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "no"}],
}  # fmt: skip
THOUGHT = {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": None,
           "content": [{"type": "reasoning_text", "text": "France. "},
                       {"type": "reasoning_text", "text": "Its capital."}]}  # fmt: skip
SUMMED_UP = {"id": "rs_2", "type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "look",
        "arguments": "{}", "status": "completed"}  # fmt: skip
STRANGE = {"id": "ws_1", "type": "web_search_call", "status": "completed"}
USAGE = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5,
         "input_tokens_details": {"cached_tokens": 1},
         "output_tokens_details": {"reasoning_tokens": 1}}  # fmt: skip


def record(state: ResponseState = ResponseState.COMPLETED, **facts: Any) -> ResponseRecord:
    return ResponseRecord(
        **{"id": "resp_1", "owner": "ann", "dialect": "sference", "model": "m", "state": state,
           "created_at": 10.5, "expires_at": 20.0, "ended_at": 12.0, "usage": USAGE,
           "output": [THOUGHT, MESSAGE, CALL, STRANGE]} | facts
    )  # fmt: skip


def test_items_are_what_the_client_reads():
    told = shown.response_row(record(), legacy=False)
    read = Response.model_validate(told)
    assert read.output is not None
    thought, message, call = read.output
    assert (thought.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert [part.text for part in message.content] == ["Paris"]
    assert thought.summary[0].text == "France. Its capital."
    # The union of what 0.0.8 and 0.3.2 look for.
    assert told["output"][0]["text"] == "France. Its capital."
    assert told["output"][0]["format"] == "openai_summary"


def test_legacy_items_are_flat():
    given = [THOUGHT, SUMMED_UP, MESSAGE, CALL]
    told = shown.response_row(record(output=given), legacy=True)
    assert told["output"] == [{"type": "output_text", "text": "Paris"}]
    asked = record(output=given, request={"include_reasoning": True})
    first, second, text = shown.response_row(asked, legacy=True)["output"]
    assert first == {
        "type": "reasoning", "text": "France. Its capital.", "format": "openai_summary"
    }  # fmt: skip
    assert (second["text"], text["type"]) == ("s", "output_text")


@pytest.mark.parametrize("state", ResponseState)
def test_every_state_has_a_word_that_clients_know(state: ResponseState):
    each = record(state, incomplete="max_output_tokens" if state == "incomplete" else None)
    read = Response.model_validate(shown.response_row(each, legacy=False))
    assert read.status == {"queued": "in_progress"}.get(state, state)
    assert (read.output is None) == (state in ("queued", "in_progress"))
    word = shown.response_row(each, legacy=True)["status"]
    assert word == {"queued": "in_progress", "incomplete": "completed"}.get(state, state)
    assert shown.list_row(each, legacy=True)["status"] == word
    event = shown.event_row(FeedEntry(1, each), legacy=True)
    assert event["status"] == word and (event["result"] is None) == (state not in (
        "completed", "incomplete"))  # fmt: skip


def test_an_event_holds_a_chat_completion():
    told = shown.event_row(FeedEntry(7, record(custom_id="c")), legacy=False)
    read = StreamInferenceCompletionEvent.model_validate(told)
    assert (read.completion_id, read.response_id) == ("cmpl_00000000000000000007", "resp_1")
    assert (read.custom_id, read.status, read.error) == ("c", "completed", None)
    assert (read.prompt_tokens, read.completion_tokens, read.total_tokens) == (3, 2, 5)
    assert read.completed_at == "1970-01-01T00:00:12.000Z" and read.result is not None
    (choice,) = read.result["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant", "content": "Paris", "refusal": None,
        "reasoning_content": "France. Its capital.",
        "tool_calls": [{"id": "call_1", "type": "function",
                        "function": {"name": "look", "arguments": "{}"}}],
    }  # fmt: skip
    cut = record(ResponseState.INCOMPLETE, incomplete="max_output_tokens", output=[MESSAGE])
    result = shown.event_row(FeedEntry(8, cut), legacy=False)["result"]
    assert result["choices"][0]["finish_reason"] == "length"


def test_an_event_of_a_failure_says_why():
    error = {"code": "server_error", "message": "it broke"}
    failed = record(ResponseState.FAILED, error=error, usage=None)
    told = shown.event_row(FeedEntry(7, failed), legacy=False)
    assert (told["result"], told["error"], told["total_tokens"]) == (None, error, None)


@pytest.mark.parametrize("name", ["cmpl_7", "cmpl_" + "0" * 21, "x", "", "cmpl_" + "٣" * 20])
def test_what_is_no_cursor(name: str):
    assert shown.serial_of(name) is None


def test_cursors_sort_as_the_feed_does():
    serials = [1, 9, 10, 2**62]
    names = [shown.cursor(each) for each in serials]
    assert names == sorted(names) and [shown.serial_of(each) for each in names] == serials


def test_a_streams_ratio_is_of_what_has_ended():
    stream = Stream("stream_1", "ann", "mail", "24h", StreamState.OPEN, 1.0, 1.0)
    assert shown.stream_row(stream, StreamCounts())["completion_ratio"] == 0.0
    counts = StreamCounts(pending=1, running=1, completed=3, failed=2, cancelled=1)
    row = shown.stream_row(stream, counts)
    assert (row["total_items"], row["completion_ratio"]) == (8, 0.75)
    assert row["last_completion_at"] is None
