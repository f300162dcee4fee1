"""Batches whose requests lie under a path, in any of Scale's forms, and whose results go to one."""

import json
import tracemalloc

import pytest

from llm_engine import nesting
from llm_engine.api.llm_engine_api.batch_rows import convert, element
from llm_engine.batches import by_path
from llm_engine.batches.by_path import array_of, lines_of, read_items
from llm_engine.batches.outcomes import failure
from llm_engine.batches.results import Spool
from llm_engine.errors import InvalidRequest
from tests.support.batches import batch_record

V1 = {"prompts": ["a", "b"], "max_new_tokens": 4, "temperature": 0.5}


def items(data, size=7):
    return list(read_items(data[at : at + size] for at in range(0, len(data), size)))


@pytest.mark.parametrize(
    "data",
    [
        b'[{"a": 1.5}, {"a": [2]}]',
        b'\xef\xbb\xbf \n[\n{"a": 1.5},\n{"a": [2]}\n]\n',
        b'{"a": 1.5}\n{"a": [2]}\n',
        b'{"a": 1.5}\r\n\r\n{"a": [2]}',
    ],
)
def test_an_array_and_lines_are_the_same(data):
    assert items(data) == [{"a": 1.5}, {"a": [2]}]


def test_an_object_may_lie_on_one_line_or_on_many():
    for indent in (None, 2):
        assert items(json.dumps(V1, indent=indent).encode()) == [V1]


@pytest.mark.parametrize("data", [b"", b" \n", b"[]"])
def test_nothing_is_no_item(data):
    assert items(data) == []


@pytest.mark.parametrize("data", [b"[{", b"[1 2]", b"{]", b'{"a": 1}\noops\n', b"\x00"])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(InvalidRequest) as refused:
        items(data)
    assert (refused.value.param, refused.value.code) == ("input_data_path", "invalid_json")


BAD = b"[" * 60_000
MANY = b"{}," * 6_000


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (BAD, 0),  # all in one piece, as it is read
        (b'[{"a": 1}, ' + BAD, 1),
        (b'[{"a": 1}, {"b": [' + MANY, 1),
        (b'[{"b": [' + MANY[:-6_000] + b'{}], "c": [' + MANY[:-6_000], 0),  # key by key
        (b'{"b":\n' + BAD, 0),
        (b'{"a": 1}\n{"b": [' + MANY + b"{}]}\n", 1),
        (b'{"b": [' + MANY + b"{}]}", 0),
        (b'{"b": [\n' + MANY.replace(b",", b",\n"), 0),
        (b'{"":\n' + b'{"":' * 60_000, 0),  # whose path is empty at every level
        (b'[{"' + b"a" * 60_000 + b'": [', 0),
    ],
    ids="deep deep-item wide wide-keys deep-object line one-line many-lines no-path path".split(),
)
def test_an_item_that_costs_more_than_its_text_is_refused(monkeypatch, data, item):
    for module in (by_path, nesting):
        monkeypatch.setattr(module, "MOST_VALUES", 10_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refused:
            items(data, size=65_536)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(refused.value) == (
        f"Invalid 'input[{item}]': it is nested too deeply, or holds too many values."
    )
    assert refused.value.param == "input_data_path"
    assert peak < 100 * 2**20


def test_a_long_line_and_many_items_are_no_such_thing(monkeypatch):
    monkeypatch.setattr(by_path, "MOST_VALUES", 1_000)  # of bytes, from where lines are watched
    long = {"prompts": ["a,[{" * 1_000, "b"], "n": 1.5}
    for data in (json.dumps(long).encode(), json.dumps(long, indent=2).encode()):
        assert items(data, size=65_536) == [long]
    assert len(items(b'{"a": [1, 2]}\n' * 10, size=65_536)) == 10
    with pytest.raises(InvalidRequest, match="neither a JSON array"):
        items(b'{"a": "' + b"b" * 2_000 + b'"} oops\n')
    monkeypatch.setattr(nesting, "MOST_VALUES", 10)
    assert len(items(b"[" + b'{"a": [1, 2]},' * 99 + b"{}]", size=65_536)) == 100


def test_items_become_rows_for_the_batchs_model():
    record = batch_record(model="m", dialect="llm_engine")
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "model": "other"}
    (first,) = map(json.loads, lines_of(record, [chat]))
    assert first["url"] == "/v1/chat/completions" and first["custom_id"] == "0"
    assert first["body"]["model"] == "m" and "stream" not in first["body"]
    rows = [json.loads(line) for line in lines_of(record, [V1])]
    assert [r["body"]["prompt"] for r in rows] == ["a", "b"]
    assert [r["custom_id"] for r in rows] == ["0", "1"]


def test_results_are_an_array_in_the_inputs_order():
    with Spool(3) as spool:
        for number in (2, 0, 1):
            line = failure("batch_ab", number, str(number), "c", f"end {number}").line
            spool.add(number, line, failed=True)
        told = json.loads(b"".join(array_of(batch_record(), spool)))
    assert [each["error"]["message"] for each in told] == ["end 0", "end 1", "end 2"]


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {}},
        {"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 1}},
        {"choices": [], "usage": None},
        {},
    ],
    ids=str,
)
def test_an_answer_that_is_none_costs_only_its_own_row(answer):
    line = {"response": {"status_code": 200, "body": answer}, "error": None}
    assert element(line, "scale_v1")["error"]["message"].startswith("The model's answer has no")


def test_items_without_end_are_refused():
    deep: list = []
    for _ in range(600):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        convert({"messages": deep}, "scale_v2", "item")
