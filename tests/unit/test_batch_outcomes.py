"""What an answer means for its row, and the line it becomes."""

import json

import pytest

from llm_engine.batches.gateways import Answer
from llm_engine.batches.job import may_change
from llm_engine.batches.outcomes import Verdict, failure, judge, result
from llm_engine.records import Usage

ERROR = b'{"error": {"message": "no", "type": "x", "param": null, "code": "c"}}'
AWAY = b'{"error": {"message": "no", "code": "upstream_unavailable"}}'


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, b"{}", Verdict.DONE),
        (200, b"<html>", Verdict.FAILED),
        (200, b"", Verdict.FAILED),
        (400, ERROR, Verdict.REFUSED),
        (404, ERROR, Verdict.REFUSED),
        (413, ERROR, Verdict.REFUSED),
        (404, b"Not found", Verdict.AWAY),  # a load balancer without a gateway behind it
        (400, b"<html>", Verdict.FAILED),
        (401, ERROR, Verdict.STRANGER),
        (408, ERROR, Verdict.FAILED),
        (429, ERROR, Verdict.BUSY),
        (500, ERROR, Verdict.FAILED),
        (502, b"", Verdict.FAILED),
        (502, ERROR, Verdict.FAILED),
        (502, AWAY, Verdict.AWAY),  # an external model's server
        (504, AWAY, Verdict.AWAY),
        (400, AWAY, Verdict.REFUSED),
        (503, ERROR, Verdict.AWAY),
        (503, b"", Verdict.AWAY),
        (504, ERROR, Verdict.FAILED),
    ],
)
def test_an_answer_is_judged_by_whose_fault_it_is(status, body, verdict):
    assert judge(Answer(status, body))[0] is verdict


def line_of(answer, model=None):
    done = result("batch_ab", 7, "mine", answer, judge(answer)[1], model)
    assert done.line.endswith(b"\n") and done.line.count(b"\n") == 1
    return json.loads(done.line), done


def test_an_answer_becomes_a_line_and_its_tokens_are_counted():
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
             "prompt_tokens_details": {"cached_tokens": 4},
             "completion_tokens_details": {"reasoning_tokens": 2}}  # fmt: skip
    body = {"id": "x", "model": "m", "usage": usage}
    line, done = line_of(Answer(200, json.dumps(body, indent=1).encode(), "req_1"))
    assert line == {
        "id": "batch_req_ab00000007",
        "custom_id": "mine",
        "response": {"status_code": 200, "request_id": "req_1", "body": body},
        "error": None,
    }
    assert (done.row, done.failed, done.usage) == (7, False, Usage(5, 4, 3, 2))


def test_the_private_name_of_a_model_is_not_shown():
    line, _ = line_of(Answer(200, b'{"model": "batch_ab", "id": "x"}'), model="llama")
    assert line["response"]["body"] == {"model": "llama", "id": "x"}


def test_a_refusal_keeps_its_body_and_words_that_are_no_json_are_wrapped():
    line, done = line_of(Answer(400, ERROR))
    assert line["response"]["body"] == json.loads(ERROR) and line["error"] is None
    assert done.failed and done.usage == Usage()
    line, _ = line_of(Answer(502, b"<html>bad\ngateway"))
    assert line["response"]["body"]["error"]["message"] == "<html>bad\ngateway"


def test_usage_that_is_nonsense_counts_nothing():
    _, done = line_of(
        Answer(200, b'{"usage": {"prompt_tokens": "many", "completion_tokens": null}}')
    )
    assert done.usage == Usage()
    _, done = line_of(Answer(200, b'{"usage": {"input_tokens": 2, "output_tokens": 3}}'))
    assert done.usage == Usage(2, 0, 3, 0)


def test_a_row_without_an_answer_has_its_reason():
    line = json.loads(failure("batch_ab", 0, None, "code", "why").line)
    assert line["response"] is None and line["error"] == {"code": "code", "message": "why"}


@pytest.mark.parametrize(
    ("status", "body", "passes"),
    [
        (200, b"{}", False),
        (400, b"<html>", False),  # a proxy that cannot read the request: nor will it later
        (404, b'{"error": {}}', False),
        (404, b"no such application", True),
        (401, b"{}", True),
        (429, b"{}", True),
        (503, b"{}", True),
    ],
)
def test_whether_a_model_is_there_is_asked_again_only_where_the_answer_may_change(
    status, body, passes
):
    assert may_change(Answer(status, body)) is passes
