"""sference's clients, new and old, and its command line, against the running system on vLLM."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from sference_sdk import SferenceClient
from sference_sdk.client import ApiError

from tests.support.cluster import Cluster
from tests.support.sference import old_client, sference

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUESTION = "What is the capital of France?"
CHAT: dict[str, Any] = {
    "model": "demo-chat",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 20,
    "temperature": 0,
}
RESPONSES: dict[str, Any] = {
    "model": "demo-chat",
    "input": QUESTION,
    "max_output_tokens": 20,
    "temperature": 0,
}


@pytest.fixture
def client(cluster: Cluster) -> Any:
    with SferenceClient(base_url=f"{cluster.url}/sference", api_key=cluster.KEY) as client:
        yield client


def test_a_batch_of_both_kinds_of_rows_is_answered_in_their_order(
    cluster: Cluster, client: SferenceClient, tmp_path: Path
):
    too_long = CHAT | {"messages": [{"role": "user", "content": "word " * 5000}]}
    made = client.submit_batch(
        requests=[
            {"custom_id": "chat", "body": CHAT},
            {"custom_id": "too long", "body": too_long},
            {"body": RESPONSES},
            *({"custom_id": str(i), "body": CHAT} for i in range(40)),
        ]
    )
    ended = client.wait_for_completion(made.id, poll_interval=0.2, timeout=60)
    assert (ended.status, ended.request_count) == ("completed", 43)
    assert ended.total_prompt_tokens > 0 and ended.total_completion_tokens > 0
    results = client.get_results(made.id)
    rows = results.rows()
    assert [row.custom_id for row in rows] == ["chat", "too long", None, *map(str, range(40))]
    assert rows[1].status == "failed" and rows[1].error_json is not None
    assert rows[1].error_json["code"] == "context_length_exceeded"
    for row in (rows[0], *rows[2:]):
        assert row.status == "completed" and "Paris" in row.completion_text
    client.download_results_jsonl(made.id, tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results.results
    assert results.output_url is not None
    assert len(httpx.get(results.output_url, trust_env=False).text.splitlines()) == 42

    there = cluster.openai().batches.retrieve(made.id)  # and in OpenAI's dialect
    assert there.status == "completed" and there.request_counts is not None
    assert (there.request_counts.completed, there.request_counts.failed) == (42, 1)


def test_a_batch_that_is_cancelled_ends_with_what_is_finished(client: SferenceClient):
    made = client.submit_batch(requests=[{"body": CHAT} for _ in range(2000)])
    assert client.cancel_batch(made.id).status in ("running", "cancelled")
    assert client.wait_for_completion(made.id, poll_interval=0.2, timeout=60).status == "cancelled"
    results = client.get_results(made.id).results
    assert results is not None and len(results) < 2000
    assert made.id in [batch.id for batch in client.list_batches().items]


def test_a_wrong_row_is_named_and_nothing_runs(client: SferenceClient):
    before = [batch.id for batch in client.list_batches().items]
    with pytest.raises(ApiError, match=r"^400: .*requests\[1\] \(custom_id 'b'\)"):
        client.submit_batch(
            requests=[{"custom_id": "a", "body": CHAT},
                      {"custom_id": "b", "body": CHAT | {"temperature": 9}}]
        )  # fmt: skip
    assert [batch.id for batch in client.list_batches().items] == before


def test_the_client_of_last_year_gets_its_answers(cluster: Cluster, tmp_path: Path):
    url = f"{cluster.url}/sference"
    rows = [{"custom_id": "a", "body": CHAT}, {"custom_id": "b", "body": RESPONSES}]
    (made,) = old_client(url, cluster.KEY, tmp_path, ["submit_batch", {"requests": rows}])
    this = {"batch_id": made["id"]}
    waiting = {"poll_interval": 0.2, "timeout": 60}
    ended, results = old_client(
        url, cluster.KEY, tmp_path, ["wait_for_completion", this | waiting], ["get_results", this]
    )
    assert ended["status"] == "completed"
    texts = [row["result_json"]["choices"][0]["message"]["content"] for row in results["results"]]
    assert len(texts) == 2 and all("Paris" in text for text in texts)


def test_the_command_line_streams_its_answers(cluster: Cluster, tmp_path: Path):
    given = tmp_path / "questions.jsonl"
    given.write_text(json.dumps({"content": QUESTION}) + "\n")
    printed = sference(
        cluster.url, tmp_path, "batch", "stream", "--input-file", given, "--model", "demo-chat",
        "--poll-interval", "0.2", key=cluster.KEY,
    )  # fmt: skip
    (row,) = [json.loads(line) for line in printed.splitlines()]
    assert row["custom_id"] == "request-1"
    assert "Paris" in row["result_json"]["choices"][0]["message"]["content"]
    listed = sference(cluster.url, tmp_path, "batch", "list", "--json", key=cluster.KEY)
    assert json.loads(listed)["items"][0]["status"] == "completed"


def test_responses_are_answered_at_once_and_later(cluster: Cluster, client: SferenceClient):
    now = client.create_response(**RESPONSES)
    later = client.create_response(**RESPONSES, background=True)
    assert (now.status, later.status, later.output) == ("completed", "in_progress", None)
    ended = client.wait_for_response(later.id, poll_interval=0.1, timeout=60)
    for made in (now, ended):
        assert made.output is not None and made.usage is not None
        (message,) = made.output
        assert "Paris" in message.content[0].text and made.usage.output_tokens > 3
    cut = client.create_response(**RESPONSES | {"max_output_tokens": 2})
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert {now.id, ended.id, cut.id} <= {row.id for row in client.list_responses().data}


def test_a_response_is_cancelled(cluster: Cluster, client: SferenceClient):
    endless = RESPONSES | {"ignore_eos": True, "max_output_tokens": 1900, "background": True}
    with cluster.client() as plain:
        made = plain.post("/sference/v1/responses", json=endless).json()["id"]
    client.cancel_response(made)
    ended = client.wait_for_response(made, poll_interval=0.1, timeout=20)
    assert ended.status in ("cancelled", "completed")  # a quick machine may be done before


def test_a_stream_tells_its_answers(
    cluster: Cluster, client: SferenceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SFERENCE_STREAM_CHECKPOINTS", str(tmp_path / "mine.json"))
    made = client.create_stream("questions").id
    given = tmp_path / "questions.jsonl"
    given.write_text(json.dumps({"content": QUESTION}) + "\n")
    sference(
        cluster.url, tmp_path, "stream", "submit", "--stream-id", made, "--input-file", given,
        "--model", "demo-chat", key=cluster.KEY,
    )  # fmt: skip
    metadata = {"stream_id": made, "completion_window": "24h"}
    for number in range(20):
        asked = {"metadata": metadata | {"custom_id": str(number)}}
        client.create_response(**RESPONSES | asked)
    seen: list[Any] = []
    deadline = time.monotonic() + 60
    while len(seen) < 21:
        assert time.monotonic() < deadline, f"only {len(seen)} events came"
        seen += client.iter_responses_events(stream_id=made)
    cursors = [event.completion_id for event in seen]
    assert cursors == sorted(set(cursors))
    assert sorted(event.custom_id or "" for event in seen) == sorted(["", *map(str, range(20))])
    for event in seen:
        assert event.result is not None and event.status == "completed"
        assert "Paris" in event.result["choices"][0]["message"]["content"]
    full = client.get_stream(made)
    assert (full.completed_items, full.completion_ratio) == (21, 1.0)
    assert full.latest_completion_id == cursors[-1]
    assert client.cancel_stream(made).status == "cancelled"
    with pytest.raises(ApiError, match=r"^409: "):
        client.create_response(**RESPONSES | {"metadata": metadata})


def test_older_clients_read_their_responses(cluster: Cluster, tmp_path: Path):
    url = f"{cluster.url}/sference"
    made, events = old_client(
        url, cluster.KEY, tmp_path, ["create_response", RESPONSES], ["list_responses_events", {}]
    )
    assert "Paris" in made["output"][0]["content"][0]["text"]
    assert made["id"] in [event["response_id"] for event in events["data"]]
    with cluster.client() as plain:
        answer = plain.post("/sference-legacy/v1/responses", json=RESPONSES).json()
    (item,) = answer["output"]
    assert item["type"] == "output_text" and "Paris" in item["text"]
