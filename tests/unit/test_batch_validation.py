"""A whole input file is judged before any row runs, with OpenAI's codes, params and lines."""

import json

import pytest

from llm_engine.batches.rows import read_rows
from llm_engine.batches.validation import MOST_EMBEDDING_INPUTS, MOST_TOLD, Check
from llm_engine.config import parse
from tests.support.batches import batch_record, jsonl, row

LIMITS = {"batches": {"max_rows": 200}, "gateway": {"max_body_bytes": 4096}}


def check(data, **facts):
    settings = parse(LIMITS, {})
    done = Check(batch_record(**facts), settings)
    pieces = [data[at : at + 100] for at in range(0, len(data), 100)]
    done.feed(read_rows(pieces, settings.gateway.max_body_bytes))
    return done


def problems(*rows, **facts):
    """(code, param, line) of each."""
    data = b"".join(each if isinstance(each, bytes) else jsonl([each]) for each in rows)
    return [(p["code"], p["param"], p["line"]) for p in check(data, **facts).problems()]


def without(data, *path):
    *way, last = path
    inner = data
    for name in way:
        inner = inner[name]
    del inner[last]
    return data


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_good_file_tells_its_rows_and_its_model():
    done = check(jsonl(row(i, model="m") for i in range(7)))
    assert (done.problems(), done.total, done.model) == ([], 7, "m")


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{not json\n", "invalid_json_line", None),
        (b"[1]\n", "invalid_json_line", None),
        (b"\xff\xfe{\x00\n", "invalid_json_line", None),
        (without(row(1), "custom_id"), "missing_required_parameter", "custom_id"),
        (without(row(1), "method"), "missing_required_parameter", "method"),
        (without(row(1), "url"), "missing_required_parameter", "url"),
        (without(row(1), "body"), "missing_required_parameter", "body"),
        (row(1) | {"custom_id": None}, "missing_required_parameter", "custom_id"),
        (row(1) | {"custom_id": 7}, "invalid_request", "custom_id"),
        (row(1) | {"body": "text"}, "invalid_request", "body"),
        (row(0), "duplicate_custom_id", "custom_id"),
        (row(1) | {"method": "GET"}, "invalid_method", "method"),
        (row(1) | {"url": "/v1/embeddings"}, "invalid_url", "url"),
        (row(1, stream=True), "streaming_unsupported", "body.stream"),
        (without(row(1), "body", "model"), "invalid_request", "body.model"),
        (row(1, model=""), "invalid_request", "body.model"),
        (row(1, model="m" * 441), "invalid_request", "body.model"),
        (without(row(1), "body", "messages"), "invalid_request", "body.messages"),
        (row(1, model="other"), "mismatched_model", "body.model"),
        (row(1, messages="x" * 5000), "line_too_long", None),
        (row(1, tools=nested(250)), "invalid_request", None),  # it can be read, and not sent on
    ],
)
def test_a_bad_line_has_its_code_param_and_number(bad, code, param):
    assert problems(row(0), bad, row(2)) == [(code, param, 2)]


@pytest.mark.parametrize(
    ("endpoint", "param"),
    [("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/v1/responses", "input")],
)
def test_every_endpoint_has_a_field_that_its_rows_need(endpoint, param):
    asked = row(0) | {"url": endpoint}
    assert problems(asked, endpoint=endpoint) == [("invalid_request", f"body.{param}", 1)]
    asked["body"][param] = "text"
    assert problems(asked, endpoint=endpoint) == []


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n", b"  "])
def test_a_file_without_requests_is_empty(data):
    assert problems(data) == [("empty_file", None, None)]


def test_one_byte_is_no_request():
    assert problems(b"x") == [("invalid_json_line", None, 1)]


def test_marks_line_ends_and_blank_lines_are_tolerated_and_counted():
    first, second = jsonl([row(0)]).strip(), jsonl([row(1)]).strip()
    assert problems(b"\xef\xbb\xbf", first, b"\r\n\r\n\n", second) == []
    assert problems(first, b"\r\n\r\n\n", b"oops") == [("invalid_json_line", None, 4)]


def test_dialects_with_inline_rows_need_no_ids():
    for dialect in ("llm_engine", "sference"):
        assert problems(without(row(0), "custom_id"), dialect=dialect) == []


def test_one_row_more_than_allowed_is_too_many():
    assert problems(*map(row, range(200))) == []
    assert problems(*map(row, range(500))) == [("too_many_rows", None, 201)]


def test_fifty_problems_are_told_and_the_others_counted():
    done = check(b"oops\n" * 120)
    told = done.problems()
    assert len(told) == MOST_TOLD + 1
    assert [p["line"] for p in told] == [*range(1, MOST_TOLD + 1), None]
    assert "70 more" in told[-1]["message"]


def test_embedding_inputs_are_counted_over_all_rows():
    def asking(number, inputs):
        asked = row(number, input=inputs) | {"url": "/v1/embeddings"}
        return without(asked, "body", "messages")

    facts = {"endpoint": "/v1/embeddings"}
    half = ["x"] * (MOST_EMBEDDING_INPUTS // 200)
    settings = parse({"gateway": {"max_body_bytes": 10**6}}, {})
    for rows, expected in ((200, []), (201, [("too_many_inputs", 201)])):
        done = Check(batch_record(**facts), settings)
        done.feed(read_rows([jsonl(asking(i, half) for i in range(rows))], 10**6))
        assert [(p["code"], p["line"]) for p in done.problems()] == expected
    tokens = Check(batch_record(**facts), settings)  # one text, as token ids
    tokens.feed(read_rows([jsonl([asking(0, list(range(MOST_EMBEDDING_INPUTS + 1)))])], 10**6))
    assert tokens.problems() == []


def test_a_line_of_any_length_takes_no_memory():
    piece = b"x" * 2**20

    def endless():
        for _ in range(64):
            yield piece
        yield b"\n" + json.dumps(row(1)).encode()

    import tracemalloc

    tracemalloc.start()
    rows = list(read_rows(endless(), 10_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(r.number, r.line, r.data is None) for r in rows] == [(0, 1, True), (1, 2, False)]
    assert peak < 4 * 2**20


def test_what_is_quoted_can_be_kept_by_every_database():
    done = check(jsonl([row(0) | {"custom_id": "a\0b"}, row(1) | {"custom_id": "a\0b"}]))
    [told] = done.problems()
    assert told["code"] == "duplicate_custom_id" and "'ab'" in told["message"]
