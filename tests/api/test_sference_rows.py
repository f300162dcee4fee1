"""The rows of sference's batches: what becomes of them, and how a wrong one is told."""

import threading
import time
from typing import Any

import orjson
import pytest

from llm_engine import files
from llm_engine.errors import StoreUnavailable
from llm_engine.statuses import BatchState
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import (
    HI,
    KEY,
    ROWS,
    begin,
    client_of,
    http,
    problem,
    submit,
    work,
    written,
)


@pytest.fixture(scope="module")
def gateway():
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    with GatewayThread(endpoints, api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def small():
    """One with limits that a test can reach."""
    limits = {"max_rows": 20, "max_inline_bytes": 30_000, "max_open": 3}
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    with GatewayThread(
        endpoints, api_keys=[KEY], max_body_bytes=4096, sections={"batches": limits}
    ) as running:
        yield running


def test_tens_of_thousands_of_rows_do_not_hold_up_the_others(gateway):
    """The longest that anybody waits for another answer meanwhile is far from the whole."""
    text = "Please tell me all that you know about it. " * 10
    body = {"model": "fake", "messages": [{"role": "user", "content": text}]}
    rows = [{"custom_id": f"row-{i}", "body": body} for i in range(20_000)]
    waits: list[float] = []
    ended = threading.Event()

    def ask_others() -> None:
        with gateway.client() as other:
            while not ended.is_set():
                began = time.perf_counter()
                assert other.get("/health").status_code == 200
                waits.append(time.perf_counter() - began)
                time.sleep(0.01)

    asking = threading.Thread(target=ask_others)
    content = orjson.dumps({"requests": rows, "window": "24h"})
    asking.start()
    try:
        with http(gateway) as plain:
            answer = plain.post(
                "/sference/v1/batches",
                content=content,
                headers={"content-type": "application/json"},
            )
    finally:
        ended.set()
        asking.join()
    assert answer.status_code == 201 and answer.json()["request_count"] == 20_000
    assert len(content) > 9 * 2**20 and max(waits) < 2
    found = written(gateway, answer.json()["id"])
    assert len(found) == 20_000 and found[-1]["custom_id"] == "row-19999"


def test_rows_become_chat_requests(gateway):
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}
    listed = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user",
         "content": [{"type": "input_text", "text": "What is it?"}, image]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    answer = submit(gateway, [
        {"custom_id": "chat", "body": HI | {"stream": False, "background": None, "top_k": 3}},
        {"custom_id": "thinks", "body": HI | {"enable_thinking": False, "include_reasoning": True,
                                              "chat_template_kwargs": {"other": 1}}},
        {"body": {"model": "fake", "input": "Hello", "instructions": "Be kind.",
                  "max_output_tokens": 9, "temperature": 0.5, "top_p": None, "background": False,
                  "enable_thinking": True, "metadata": {"who": "me"}}},
        {"body": {"model": "fake", "input": listed}},
    ], window="24h")  # fmt: skip
    assert answer.status_code == 201, answer.text
    lines = written(gateway, answer.json()["id"])
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert [line["custom_id"] for line in lines] == ["chat", "thinks", None, None]
    chat, thinks, text, messages = (line["body"] for line in lines)
    assert chat == HI | {"top_k": 3}
    assert thinks == HI | {
        "include_reasoning": True, "chat_template_kwargs": {"other": 1, "enable_thinking": False}
    }  # fmt: skip
    assert text == {
        "model": "fake", "max_completion_tokens": 9, "temperature": 0.5, "top_p": None,
        "metadata": {"who": "me"}, "chat_template_kwargs": {"enable_thinking": True},
        "messages": [{"role": "system", "content": "Be kind."},
                     {"role": "user", "content": "Hello"}],
    }  # fmt: skip
    assert [m["role"] for m in messages["messages"]] == ["developer", "user", "assistant", "user"]
    assert messages["messages"][1]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": image["image_url"], "detail": "low"}},
    ]


INPUT = {"model": "fake", "input": "hi"}


@pytest.mark.parametrize(
    ("row", "param", "words"),
    [
        ({"body": HI | {"temperature": 3}}, "body.temperature", "temperature"),
        ({"body": HI | {"stream": True}}, "body.stream", "must be false"),
        ({"body": INPUT | {"background": True}}, "body.background", "must be false"),
        ({"body": HI | INPUT}, "body.input", "not both"),
        ({"body": {"model": "fake"}}, "body.messages", "Missing"),
        ({"body": {"messages": HI["messages"]}}, "body.model", "model"),
        ({"body": HI | {"max_token": 5}}, "body.max_token", "Did you mean 'max_tokens'"),
        ({"body": HI | {"model": "other"}}, "body.model", "A batch has one model"),
        ({"body": INPUT | {"max_output_tokens": 0}}, "body.max_output_tokens", "max_output_tokens"),
        ({"body": INPUT | {"tools": []}}, "body.tools", "not supported"),
        ({"body": INPUT | {"instructions": 5}}, "body.instructions", "string"),
        ({"body": INPUT | {"enable_thinking": "yes"}}, "body.enable_thinking", "true or false"),
        ({"body": INPUT | {"input": []}}, "body.input", "not empty"),
        ({"body": INPUT | {"input": [{"role": ["user"], "content": "x"}]}}, "body.input[0].role",
         "one of"),
        ({"body": INPUT | {"input": [{"type": "function_call"}]}}, "body.input[0]", "message"),
        ({"body": INPUT | {"input": [{"role": "user", "content": [{"type": {}}]}]}},
         "body.input[0].content[0]", "input_text"),
        ({"body": "hi"}, "body", "object"),
        ({}, "body", "object"),
        ({"body": HI, "method": "POST"}, "method", "Unknown"),
        ({"custom_id": 5, "body": HI}, "custom_id", "string"),
        ({"custom_id": "first", "body": HI}, "custom_id", "there already"),
        ("hi", None, "object"),
        ([HI], None, "object"),
        ({"body": HI | {"user": "x" * 5000}}, None, "gateway.max_body_bytes"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_and_nothing_is_made(small, row, param, words):
    before = small.services.store.batches.page(None, None, 10)
    answer = submit(small, [{"custom_id": "first", "body": HI}, row])
    detail, where = problem(answer)
    assert where == ("requests[1]" if param is None else f"requests[1].{param}")
    assert words in detail and "requests[1]" in detail
    assert small.services.store.batches.page(None, None, 10) == before
    assert not list(small.services.storage.list("files/"))


def test_the_custom_id_is_told_with_a_wrong_row(gateway):
    row = {"custom_id": "mine", "body": HI | {"top_p": 7}}
    detail, param = problem(submit(gateway, [*ROWS, row]))
    assert detail.startswith("requests[3] (custom_id 'mine'): ")
    assert param == "requests[3].body.top_p"


def test_a_model_that_is_not_there_is_a_404_and_one_that_embeds_a_400(gateway):
    lost = [{"custom_id": "x", "body": HI | {"model": "lost"}}]
    assert "'lost' does not exist" in problem(submit(gateway, lost), 404)[0]
    embeds = [{"body": HI | {"model": "vectors"}}]
    assert "makes embeddings" in problem(submit(gateway, embeds))[0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"requests": [', "not valid JSON"),
        (b'{"requests": []} {}', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"requests": [{"body": NaN}]}', "not valid JSON"),
        (b'{"requests": [{"body": {"seed": 123456789012345678901234567890}}]}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"requests"', "must be a JSON object"),
        (b"{}", "'requests' or 'input_file_id'"),
        (b'{"requests": null}', "array"),
        (b'{"requests": {"item": {}}}', "array"),
        (b'{"requests": []}', "at least one"),
        (b'{"requests.item": {}}', "Unknown parameter: 'requests.item'"),
        (b'{"requests": [], "requests": []}', "twice"),
        (b'{"requests": [], "metadata": {"a": "b"}}', "Unknown parameter: 'metadata'"),
        (b'{"window": "1h", "requests": [{"body": {"model": "fake", "input": "hi"}}]}', "24h"),
        (b'{"window": ["24h"], "requests": []}', "string"),
        (b'{"requests": [' + b"[" * 9000, "object"),
        (b'{"requests": [{"body": ' + b'{"a":' * 5000, "nested too deeply"),
        (b'{"requests": [{"body": {"model": "fake", "input": ' + b"[" * 400 + b"]" * 400 + b"}}]}",
         "nested too deeply"),
        (b'{"requests": [{"body": {"model": "fake", "input": ' + b"[" * 150 + b"]" * 150 + b"}}]}",
         "message"),
        (b'{"requests": [{"body": {"model": "fake", "messages": ' + b'{"":' * 300 + b"1"
         + b"}" * 302 + b"]}", "Invalid 'body'"),
    ],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused(small, body, words):
    with http(small) as client:
        answer = client.post("/sference/v1/batches", content=body)
    assert words in problem(answer)[0]


def test_limits_are_told_by_the_name_of_their_setting(small):
    rows = [{"custom_id": str(i), "body": HI} for i in range(21)]
    assert "batches.max_rows" in problem(submit(small, rows))[0]
    much = [{"body": HI | {"user": "x" * 3000}} for _ in range(11)]
    assert "batches.max_inline_bytes" in problem(submit(small, much), 413)[0]

    def pieces():
        yield from (orjson.dumps({"requests": much}), b"")

    with http(small) as client:  # without a content-length
        answer = client.post("/sference/v1/batches", content=pieces())
    assert "batches.max_inline_bytes" in problem(answer, 413)[0]
    made = [submit(small, rows[:1]) for _ in range(4)]
    assert [answer.status_code for answer in made] == [201, 201, 201, 429]
    assert "batches.max_open" in problem(made[3], 429)[0] and made[3].headers["retry-after"]
    with client_of(small) as client:
        for answer in made[:3]:
            small.services.store.batches.end(
                small.services.store.batches.get(answer.json()["id"]), BatchState.CANCELLED
            )
            assert client.get_batch(answer.json()["id"]).status == "cancelled"
            file = small.services.store.batches.get(answer.json()["id"]).input_file_id
            files.discard(small.services.storage, small.services.store, file)


def test_a_batch_over_a_file_that_was_uploaded_elsewhere(gateway):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": HI}
    kept = files.keep(
        gateway.services.storage, gateway.services.store, owner="llm-engine", purpose="batch",
        filename="rows.jsonl", pieces=[orjson.dumps(line)],
    )  # fmt: skip
    asked = {"input_file_id": kept.id, "endpoint": "/v1/chat/completions"}
    with http(gateway) as plain:
        made = plain.post("/sference/v1/batches", json=asked | {"completion_window": "24h"})
        assert made.status_code == 201 and made.json()["status"] == "pending"
        begin(gateway, made.json()["id"])
        work(gateway, made.json()["id"])
        results = plain.get(f"/sference/v1/batches/{made.json()['id']}/results").json()["results"]
        assert [row["custom_id"] for row in results] == ["a"]

        def refused(status: int = 400, **fields: Any) -> str:
            return problem(plain.post("/sference/v1/batches", json=asked | fields), status)[0]

        assert "not both" in refused(requests=ROWS)
        assert "endpoint" in refused(endpoint=None)
        assert "endpoint" in refused(endpoint="/v1/nothing")
        assert "completion_window" in refused(completion_window="1h")
        assert "No such File object" in refused(404, input_file_id="file-0")


def test_a_batch_that_may_be_there_keeps_its_rows(gateway, monkeypatch):
    """The store has taken it, and its answer was lost."""
    store, storage = gateway.services.store, gateway.services.storage
    create = store.batches.create

    def deaf(*given: Any, **named: Any) -> None:
        create(*given, **named)
        raise StoreUnavailable("The store does not answer now.")

    monkeypatch.setattr(store.batches, "create", deaf)
    before = {each.id for each in store.batches.open()}
    assert submit(gateway, [{"custom_id": "a", "body": HI}]).status_code == 503
    [made] = [each for each in store.batches.open() if each.id not in before]
    kept = storage.read(store.files.get(made.input_file_id).key)
    assert orjson.loads(b"".join(kept))["custom_id"] == "a"
