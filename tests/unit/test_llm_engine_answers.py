"""From this API's completion bodies to vLLM's, and from vLLM's answers and events back."""

import json

import pytest

from llm_engine.api.llm_engine_api.answers import CompletionForm
from llm_engine.api.llm_engine_api.completions import engine_body, model_name, parse
from llm_engine.api.requests import EngineRequest, Kind
from llm_engine.errors import InternalError, InvalidRequest

REQUEST = EngineRequest(Kind.COMPLETIONS, "/v1/completions", "it", True, b"{}", True)


def converted(stream=False, ours=True, **fields):
    body = parse(json.dumps({"prompt": "hi"} | fields).encode())
    return engine_body(body, "it", stream, ours=ours)


def chunk(text="", reason=None, usage=None, tokens=None):
    logprobs = None
    if tokens is not None:
        logprobs = {"tokens": list(tokens), "token_logprobs": list(tokens.values())}
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
    event = {"object": "text_completion", "choices": [choice]}
    if usage:
        event["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(event).encode()


def final(prompt, completion):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return json.dumps({"choices": [], "usage": usage}).encode()


def events(*payloads, log_probs=False):
    form = CompletionForm(log_probs=log_probs)
    data = b"".join(form.event(REQUEST, payload) for payload in payloads)
    assert b"[DONE]" not in data
    return [json.loads(event[6:]) for event in data.split(b"\n\n") if event]


def outputs(*payloads, **options):
    return [event["output"] for event in events(*payloads, **options)]


# -- bodies


def test_nulls_are_the_defaults():
    nulls = dict.fromkeys(
        "max_new_tokens temperature stop_sequences return_token_log_probs presence_penalty "
        "frequency_penalty top_k top_p include_stop_str_in_output guided_json guided_regex "
        "guided_choice guided_grammar skip_special_tokens".split()
    )
    assert converted(**nulls) == {
        "model": "it", "prompt": "hi", "max_tokens": 20, "temperature": 0.2, "stream": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"max_new_tokens": 3}, {"max_tokens": 3}),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, {"stop": ["a", "b", "c", "d", "e"]}),
        ({"return_token_log_probs": True}, {"logprobs": 1}),
        ({"top_k": 5, "top_p": 0.5}, {"top_k": 5, "top_p": 0.5}),
        ({"presence_penalty": 1, "frequency_penalty": 0.5},
         {"presence_penalty": 1, "frequency_penalty": 0.5}),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"guided_json": {"type": "object"}},
         {"structured_outputs": {"json": {"type": "object"}}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_choice": ["a"]}, {"structured_outputs": {"choice": ["a"]}}),
        ({"guided_grammar": "root ::= x"}, {"structured_outputs": {"grammar": "root ::= x"}}),
        ({"temperature": 0, "top_k": -1, "top_p": 1.0}, {"temperature": 0}),
    ],
)  # fmt: skip
def test_each_field_has_vllms_name(fields, sent):
    assert converted(**fields) == converted() | sent


def test_what_says_the_default_is_not_sent():
    assert (
        converted(top_k=-1, top_p=1, presence_penalty=0, skip_special_tokens=True,
                  include_stop_str_in_output=False, return_token_log_probs=False)
        == converted()
    )  # fmt: skip


def test_streams_ask_for_counts_and_only_vllm_for_running_ones():
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert converted(stream=True)["stream_options"] == options
    assert converted(stream=True, ours=False)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": "3"}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 0, "top_k": 5}, "top_k"),
        ({"temperature": 0, "top_p": 0.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"return_token_log_probs": 1}, "return_token_log_probs"),
        ({"model": "it"}, "model"),
    ],
)
def test_bad_fields_are_named(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        converted(**fields)
    assert param in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"1"])
def test_bodies_that_are_no_objects_are_refused(body):
    with pytest.raises(InvalidRequest):
        parse(body)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (b"model_endpoint_name=it", "it"),
        (b"model_endpoint_name=org/it:tag@1", "org/it:tag@1"),
        (b"model_endpoint_name=org%2Fit&x=y", "org/it"),
    ],
)
def test_the_name_is_in_the_query(query, name):
    assert model_name(query) == name


@pytest.mark.parametrize(
    "query", [b"", b"model_endpoint_name=", b"model_endpoint_name=a&model_endpoint_name=b"]
)
def test_exactly_one_name_is_needed(query):
    with pytest.raises(InvalidRequest) as caught:
        model_name(query)
    assert "model_endpoint_name" in caught.value.message


# -- answers


def test_an_answer_has_text_counts_and_tokens_if_asked():
    body = json.loads(chunk("hi you", "stop", (3, 2), {"hi": -0.5, " you": None}))
    plain = json.loads(CompletionForm(log_probs=False).answer(REQUEST, json.dumps(body)))
    told = json.loads(CompletionForm(log_probs=True).answer(REQUEST, json.dumps(body)))
    counts = {"text": "hi you", "num_prompt_tokens": 3, "num_completion_tokens": 2}
    assert plain["output"] == counts | {"tokens": None}
    assert told["output"]["tokens"] == [
        {"token": "hi", "log_prob": -0.5},
        {"token": " you", "log_prob": -9999.0},
    ]
    assert plain["request_id"] != told["request_id"]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_engine_gave_up_is_an_error(reason):
    form = CompletionForm(log_probs=False)
    with pytest.raises(InternalError):
        form.answer(REQUEST, chunk("half", reason, (1, 1)))
    with pytest.raises(InternalError):
        form.event(REQUEST, chunk("half", reason, (1, 1)))


# -- events


def test_the_last_event_of_vllm_is_finished_and_counts_the_prompt():
    got = events(
        chunk("a", usage=(5, 1)), chunk("bc", usage=(5, 3)), chunk("", "length", (5, 4)),
        final(5, 4), b"[DONE]",
    )  # fmt: skip
    assert len({event["request_id"] for event in got}) == 1
    rows = [event["output"] for event in got]
    assert [row["text"] for row in rows] == ["a", "bc", ""]
    assert [row["finished"] for row in rows] == [False, False, True]
    assert [row["num_prompt_tokens"] for row in rows] == [None, None, 5]
    assert [row["num_completion_tokens"] for row in rows] == [1, 3, 4]
    assert all(row["token"] is None for row in rows) and all(not e["error"] for e in got)


def test_events_are_counted_where_the_engine_does_not():
    rows = outputs(chunk("a"), chunk("b"), chunk("c", "stop"), b"[DONE]")
    assert [row["num_completion_tokens"] for row in rows] == [1, 2, 3]
    assert [row["finished"] for row in rows] == [False, False, True]
    late = outputs(chunk("a"), chunk("b", "stop"), final(2, 7), b"[DONE]")
    assert late[-1]["num_completion_tokens"] == 7 and late[-1]["num_prompt_tokens"] == 2


def test_an_event_of_several_tokens_becomes_one_event_a_token():
    rows = outputs(
        chunk("abc", "stop", (1, 4), {"a": -1, "b": -2, "c": -3}), b"[DONE]", log_probs=True
    )
    assert [row["token"]["token"] for row in rows] == ["a", "b", "c"]
    assert [row["num_completion_tokens"] for row in rows] == [2, 3, 4]
    assert "".join(row["text"] for row in rows) == "abc"
    assert [row["finished"] for row in rows] == [False, False, True]


def test_no_event_comes_near_64_kib():
    form = CompletionForm(log_probs=False)
    text = "\x01" * 50_000  # six bytes each in JSON
    data = form.event(REQUEST, chunk(text, usage=(1, 9)))
    sizes = [len(event) for event in data.split(b"\n\n")]
    assert max(sizes) < 64 * 1024
    pieces = [json.loads(event[6:])["output"]["text"] for event in data.split(b"\n\n") if event]
    assert "".join(pieces) == text


def test_an_event_that_is_shown_twice_counts_once():
    form = CompletionForm(log_probs=False)
    first = chunk("a")
    assert form.event(REQUEST, first) == form.event(REQUEST, first)
    again = json.loads(form.event(REQUEST, chunk("a"))[6:])
    assert again["output"]["num_completion_tokens"] == 2


def test_a_stream_without_a_reason_still_finishes():
    rows = outputs(chunk("a"), b"[DONE]")
    assert [row["finished"] for row in rows] == [False, True]


def test_a_failure_is_an_event_with_a_status():
    data = CompletionForm(log_probs=False).failure(InternalError("it broke"))
    event = json.loads(data[6:])
    assert event["output"] is None
    assert event["error"]["status_code"] == 500
    assert event["error"]["content"]["error"] == "it broke"
    assert event["error"]["content"]["timestamp"].endswith("+00:00")
