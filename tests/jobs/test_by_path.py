"""Requests that lie under a path and results that go to one, with the real job."""

import json
from collections.abc import Iterator

import pytest

from llm_engine.files import new_file_id
from llm_engine.statuses import BatchState
from llm_engine.storage.opening import open_path
from tests.support.batches import Bench
from tests.support.gateway import GatewayThread, fake_endpoint

pytestmark = pytest.mark.slow

V1 = {"prompts": [f"q{i}" for i in range(5)], "max_new_tokens": 3, "temperature": 0.5}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    sections = {"batches": {"lease_s": 2, "max_rows": 50, "max_file_bytes": 100_000}}
    with GatewayThread([fake_endpoint("fake")], sections=sections) as gateway:
        bench = Bench(gateway.settings, [gateway.url])
        yield bench
        bench.close()


def batch_of(bench, path, form, **options):
    """As Scale's dialect makes it: nobody knows yet what its rows are."""
    given = {"input_path": path, "output_form": form} | options
    return bench.batch(
        b"", input_file_id=new_file_id(), dialect="llm_engine", model="fake",
        endpoint="/v1/completions", options=given,
    )  # fmt: skip


def put(bench, path, content):
    storage, key = open_path(bench.settings, path, owner="ann")
    storage.put(key, content if isinstance(content, bytes) else json.dumps(content).encode())


def read(bench, path):
    storage, key = open_path(bench.settings, path, owner="ann")
    return json.loads(b"".join(storage.read(key)))


def test_prompts_come_from_a_path_and_their_answers_go_to_one(bench):
    put(bench, "v1.json", V1)
    batch = batch_of(bench, "v1.json", "scale_v1", output_path="out/v1.json")
    code, printed, record = bench.run(batch)
    assert (code, record.state, record.completed) == (0, BatchState.COMPLETED, 5), printed
    told = read(bench, "out/v1.json")
    assert [each["num_completion_tokens"] for each in told] == [3] * 5
    assert len(bench.results(batch)[0]) == 5


def test_chat_items_become_a_batch_of_chats_and_bad_ones_an_error_in_their_place(bench):
    chats = [{"messages": [{"role": "user", "content": f"{i}"}], "seed": i} for i in range(6)]
    chats[2]["temperature"] = 3
    put(bench, "v2.json", chats)
    batch = batch_of(bench, "v2.json", "scale_v2", output_path="out/v2.json")
    code, printed, record = bench.run(batch)
    assert (code, record.completed, record.failed) == (0, 5, 1), printed
    assert record.endpoint == "/v1/chat/completions"
    told = read(bench, "out/v2.json")
    assert [each.get("object", "error") for each in told] == [
        "chat.completion", "chat.completion", "error", "chat.completion", "chat.completion",
        "chat.completion",
    ]  # fmt: skip
    assert told[5]["choices"][0]["message"]["content"].startswith("5 ")
    assert "temperature" in told[2]["error"]["message"]


@pytest.mark.parametrize(
    ("path", "content", "code"),
    [
        ("nothing.json", None, "invalid_request"),
        ("/etc/passwd", None, None),
        ("bad.json", b"[{]", "invalid_json"),
        ("odd.json", [{"neither": 1}], None),
        ("empty.json", [], "empty_file"),
        ("many.json", [{"prompt": "x"}] * 51, "too_many_rows"),
        ("large.json", [{"prompt": "x" * 99_999}] * 2, "file_too_large"),
    ],
)
def test_input_that_cannot_be_read_fails_the_batch_with_its_reason(bench, path, content, code):
    if content is not None:
        put(bench, path, content)
    exit_code, printed, record = bench.run(batch_of(bench, path, "scale_v2"))
    assert (exit_code, record.state) == (0, BatchState.FAILED), printed
    assert record.errors[0]["code"] == code or code is None
    assert record.reason and "Traceback" not in printed


def test_an_output_path_that_cannot_be_written_fails_the_batch_and_keeps_its_results(bench):
    put(bench, "v1.json", V1)
    batch = batch_of(bench, "v1.json", "scale_v1", output_path="/proc/none/out.json")
    code, printed, record = bench.run(batch)
    assert (code, record.state) == (0, BatchState.FAILED), printed
    assert record.errors[0]["code"] == "output_path_unwritable"
    assert "/proc/none/out.json" in record.reason
    assert len(bench.results(batch)[0]) == 5
