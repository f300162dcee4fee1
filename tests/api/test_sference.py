"""sference's dialect, driven by its own clients, and what HTTP alone can show of it.

No job runs here: `work` does to a batch what a job would.
"""

import asyncio
import json
import threading
import time

import httpx
import pytest
from sference_sdk import AsyncSferenceClient
from sference_sdk.client import ApiError

from llm_engine import files
from llm_engine.records import BatchRecord
from llm_engine.statuses import BatchState
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import (
    HI,
    KEY,
    ROWS,
    begin,
    client_of,
    http,
    old_client,
    problem,
    sference,
    work,
)
from tests.support.upstream import new_key


@pytest.fixture(scope="module")
def gateway():
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    with GatewayThread(endpoints, api_keys=[KEY]) as running:
        yield running


@pytest.fixture
def client(gateway):
    with client_of(gateway) as client:
        yield client


# -- a batch's life, as each client sees it


def test_the_client_sees_a_batch_from_its_rows_to_its_results(gateway, client, tmp_path):
    made = client.submit_batch(requests=ROWS)
    assert (made.status, made.window, made.request_count) == ("pending", "24h", 3)
    assert made.created_at.endswith("Z") and made.completed_at is None
    assert client.get_results(made.id).results is None
    with pytest.raises(ApiError, match=r"^409: .*'status_code': 409"):
        client.download_results_jsonl(made.id, tmp_path / "none")

    begin(gateway, made.id)
    assert client.get_batch(made.id).status == "running"
    with pytest.raises(TimeoutError):
        client.wait_for_completion(made.id, poll_interval=0.01, timeout=0.05)
    work(gateway, made.id, failed={1})

    ended = client.wait_for_completion(made.id)
    assert (ended.status, ended.request_count) == ("completed", 3)
    assert (ended.total_prompt_tokens, ended.total_completion_tokens) == (14, 4)
    assert ended.total_tokens == 18
    assert made.created_at <= ended.updated_at == ended.completed_at

    results = client.get_results(made.id)
    assert (results.batch_id, results.status) == (made.id, "completed")
    assert results.completed_at == ended.completed_at
    rows = results.rows()  # in the order in which they came
    assert [(row.custom_id, row.status) for row in rows] == [
        ("a", "completed"), (None, "failed"), ("c", "completed")
    ]  # fmt: skip
    assert [rows[0].completion_text, rows[2].completion_text] == ["answer 0", "answer 2"]
    assert rows[1].error_json == {"message": "too hot", "code": "invalid_value"}
    assert rows[0].error_json is None and rows[1].result_json is None
    assert set(client.get_results_indexed(made.id)) == {"a", "c"}

    client.download_results_jsonl(made.id, tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results.results
    assert made.id in [batch.id for batch in client.list_batches().items]


def test_the_async_client_does_the_same(gateway, tmp_path):
    async def live() -> None:
        client = AsyncSferenceClient(base_url=f"{gateway.url}/sference", api_key=KEY)
        try:
            made = await client.submit_batch(requests=ROWS)
            assert (await client.get_batch(made.id)).status == "pending"
            begin(gateway, made.id)
            work(gateway, made.id)
            assert (await client.wait_for_completion(made.id)).status == "completed"
            assert len((await client.get_results(made.id)).results or ()) == 3
            await client.download_results_jsonl(made.id, tmp_path / "results.jsonl")
            assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
            assert made.id in [batch.id for batch in (await client.list_batches()).items]
            other = await client.submit_batch(requests=ROWS)
            assert (await client.cancel_batch(other.id)).status in ("running", "cancelled")
        finally:
            await client.aclose()

    asyncio.run(live())


def test_the_client_of_last_year_does_the_same(gateway, tmp_path):
    url, legacy = f"{gateway.url}/sference", f"{gateway.url}/sference-legacy"
    made, listed = old_client(url, KEY, tmp_path, ["submit_batch", {"requests": ROWS}],
                              ["list_batches", {}])  # fmt: skip
    assert made["status"] == "pending" and made["request_count"] == 3
    assert made["id"] in [batch["id"] for batch in listed["items"]]
    begin(gateway, made["id"])
    work(gateway, made["id"], failed={2})
    this, out = {"batch_id": made["id"]}, tmp_path / "results.jsonl"
    ended, results, *_ = old_client(
        legacy, KEY, tmp_path, ["wait_for_completion", this], ["get_results", this],
        ["download_results_jsonl", this | {"out": str(out)}], ["get_me", {}], ["list_models", {}],
    )  # fmt: skip
    assert ended["status"] == "completed" and ended["total_tokens"] == 18
    assert [row["status"] for row in results["results"]] == ["completed", "completed", "failed"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == results["results"]


def test_the_command_line_submits_waits_and_fetches(gateway, tmp_path):
    given = tmp_path / "rows.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": HI}
    given.write_text(json.dumps(line) + "\n\n" + json.dumps(line | {"custom_id": "b"}) + "\n")
    made = sference(gateway.url, tmp_path, "batch", "submit", "--input-file", given, "--json")
    batch = json.loads(made)["id"]
    assert "pending" in sference(gateway.url, tmp_path, "batch", "status", "--batch-id", batch)
    assert batch[:33] in sference(gateway.url, tmp_path, "batch", "list")
    begin(gateway, batch)
    work(gateway, batch)
    waited = sference(gateway.url, tmp_path, "batch", "wait", "--batch-id", batch, "--json")
    assert json.loads(waited)["status"] == "completed"
    results = sference(gateway.url, tmp_path, "batch", "results", "--batch-id", batch, "--json")
    assert [row["custom_id"] for row in json.loads(results)["results"]] == ["a", "b"]
    out = tmp_path / "deep" / "results.jsonl"
    sference(gateway.url, tmp_path, "batch", "download-results", "--batch-id", batch, "--out", out)
    assert len(out.read_text().splitlines()) == 2

    other = json.loads(
        sference(gateway.url, tmp_path, "batch", "submit", "--input-file", given, "--json")
    )["id"]
    sference(gateway.url, tmp_path, "batch", "cancel", "--batch-id", other)
    me = sference(gateway.url, tmp_path, "auth", "login", "--api-key", KEY)
    assert "Authenticated as llm-engine (admin)." in me
    assert "generation" in sference(gateway.url, tmp_path, "models", "list")


def test_the_command_line_streams_a_batch_and_remembers_it(gateway, tmp_path):
    """It keeps a file's batch until it has printed the results, so that Ctrl-C loses nothing."""
    given, cache = tmp_path / "rows.jsonl", tmp_path / "stream_cache.json"
    given.write_text('{"content": "hi"}\n{"content": "ho"}\n')
    command = ("batch", "stream", "--input-file", given, "--model", "fake",
               "--poll-interval", "0.1")  # fmt: skip
    printed: list[str] = []
    asking = threading.Thread(
        target=lambda: printed.append(sference(gateway.url, tmp_path, *command))
    )
    asking.start()
    deadline = time.monotonic() + 20
    while not (cache.exists() and "batch_" in cache.read_text()):
        assert time.monotonic() < deadline, "no batch was made"
        time.sleep(0.05)
    (entry,) = json.loads(cache.read_text()).values()
    begin(gateway, entry["batch_id"])
    work(gateway, entry["batch_id"])
    asking.join(20)
    rows = [json.loads(line) for line in printed[0].splitlines()]
    assert [row["custom_id"] for row in rows] == ["request-1", "request-2"]
    assert json.loads(cache.read_text()) == {}


# -- how a batch ends


def test_a_cancelled_batch_runs_until_it_is_drained_and_keeps_what_is_finished(gateway, client):
    made = client.submit_batch(requests=ROWS)
    begin(gateway, made.id)
    assert client.cancel_batch(made.id).status == "running"
    work(gateway, made.id, to=BatchState.CANCELLED, done=2)
    assert client.wait_for_completion(made.id).status == "cancelled"
    assert [row.custom_id for row in client.get_results(made.id).rows()] == ["a", None]
    assert client.cancel_batch(made.id).status == "cancelled"
    with http(gateway) as plain:
        answer = plain.get(f"/sference/v1/batches/{made.id}/results.jsonl")
    assert answer.status_code == 200 and len(answer.text.splitlines()) == 2
    assert answer.headers["content-type"] == "application/x-ndjson"


def test_what_has_ended_is_not_cancelled(gateway, client):
    made = client.submit_batch(requests=ROWS)
    begin(gateway, made.id)
    work(gateway, made.id)
    with pytest.raises(ApiError, match=r"409: .*its status is 'completed'"):
        client.cancel_batch(made.id)


def test_a_batch_that_failed_or_expired_says_why(gateway, client):
    batches = gateway.services.store.batches
    failed, expired = (client.submit_batch(requests=ROWS).id for _ in range(2))
    batches.end(batches.get(failed), BatchState.FAILED, reason="its model is gone")
    begin(gateway, expired)
    work(gateway, expired, to=BatchState.EXPIRED, done=1)
    assert client.wait_for_completion(failed).status == "failed"
    assert client.get_batch(expired).status == "failed"
    assert client.get_results(failed).results == []
    assert len(client.get_results(expired).rows()) == 1
    with http(gateway) as plain:
        assert plain.get(f"/sference/v1/batches/{failed}/results.jsonl").text == ""
        told = plain.get(f"/sference/v1/batches/{failed}").json()["error"]["message"]
        assert told == "its model is gone"
        told = plain.get(f"/sference/v1/batches/{expired}").json()["error"]["message"]
        assert "window" in told


def test_the_output_link_opens_without_a_key(gateway, client):
    made = client.submit_batch(requests=ROWS)
    begin(gateway, made.id)
    assert client.get_results(made.id).output_url is None
    work(gateway, made.id)
    url = client.get_results(made.id).output_url
    assert url is not None and url.startswith(gateway.url)
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", None, "c"]


def test_results_that_were_deleted_are_a_404(gateway, client):
    made = client.submit_batch(requests=ROWS)
    begin(gateway, made.id)
    record = work(gateway, made.id)
    files.discard(gateway.services.storage, gateway.services.store, record.output_file_id)
    with pytest.raises(ApiError, match=r"^404: .*No such File object"):
        client.get_results(made.id)
    assert client.get_batch(made.id).status == "completed"


# -- batches of other dialects, and of a file


def test_batches_of_every_dialect_are_listed_as_this_one_shows_them(gateway, client, tmp_path):
    """With windows, states and errors that its clients have no words for."""
    batches = gateway.services.store.batches
    template = batches.get(client.submit_batch(requests=ROWS).id)
    shown = {}
    for number, state in enumerate(BatchState):
        record = BatchRecord(
            id=f"batch_zz{number}", owner="llm-engine", dialect="openai", endpoint="/v1/embeddings",
            input_file_id=template.input_file_id, window_s=3600.0 * number, state=state,
            created_at=1.0, expires_at=2.0, errors=[{"code": "x", "message": "wrong", "line": 1}],
        )  # fmt: skip
        batches.create(record, 1000)
        shown[record.id] = state
    found = {batch.id: batch for batch in client.list_batches().items}
    assert {shown[i]: found[i].status for i in shown} == {
        "validating": "pending", "failed": "failed", "in_progress": "running",
        "finalizing": "running", "completed": "completed", "expired": "failed",
        "cancelling": "running", "cancelled": "cancelled",
    }  # fmt: skip
    assert {batch.window for batch in found.values()} == {"24h"}
    (old,) = old_client(f"{gateway.url}/sference", KEY, tmp_path, ["list_batches", {}])
    assert len(old["items"]) == len(found)
    for batch in shown:
        assert client.get_results(batch).results == ([] if shown[batch].is_final else None)


def test_what_another_owner_has_made_does_not_exist(gateway, client):
    made = client.submit_batch(requests=ROWS)
    ann, bob = (new_key(gateway, KEY, owner, "files") for owner in ("ann", "bob"))
    with client_of(gateway, ann) as anns, client_of(gateway, bob) as bobs:
        hers = anns.submit_batch(requests=ROWS)
        assert [batch.id for batch in anns.list_batches().items] == [hers.id]
        assert bobs.list_batches().items == []
        for batch in (made.id, hers.id, "batch_0"):
            for call in (bobs.get_batch, bobs.cancel_batch, bobs.get_results):
                with pytest.raises(ApiError, match=r"^404: "):
                    call(batch)
        assert anns.get_batch(hers.id).status == "pending"


# -- keys, models, and what is not there


def test_who_one_is_and_what_a_key_may_do(gateway, client):
    me = client.get_me()
    assert (me["username"], me["role"], me["realtime_enabled"]) == ("llm-engine", "admin", True)
    assert {"admin", "responses:read", "responses:write"} <= set(me["scopes"])
    with client_of(gateway, new_key(gateway, KEY, "carl", "metrics")) as poor:
        assert poor.get_me()["role"] == "user" and not poor.get_me()["realtime_enabled"]
        assert poor.get_me()["scopes"] == ["metrics"]
        with pytest.raises(ApiError, match=r"^403: .*inference"):
            poor.create_response(model="fake", input="hi")
        with pytest.raises(ApiError, match=r"^403: .*inference"):
            poor.list_responses_events()
        with pytest.raises(ApiError, match=r"^403: .*files"):
            poor.submit_batch(requests=ROWS)
        with pytest.raises(ApiError, match=r"^403: .*inference"):
            poor.create_embeddings(model="vectors", input="hi")
    with gateway.client(headers={"x-api-key": KEY}) as plain:
        assert plain.get("/sference/v1/auth/me").status_code == 200
    with client_of(gateway, "sk-wrong") as stranger, pytest.raises(ApiError, match=r"^401: "):
        stranger.get_me()
    with gateway.client() as nobody:
        assert "Bearer" in problem(nobody.get("/sference/v1/auth/me"), 401)[0]


def test_models_say_what_the_command_line_shows(client):
    rows = {row["id"]: row for row in client.list_models()["data"]}
    assert rows["fake"]["modality"] == "text_generation" and rows["fake"]["object"] == "model"
    assert rows["vectors"]["modality"] == "text_embedding"
    assert rows["fake"]["context_tokens"] == 8192 and rows["fake"]["display_name"] == "fake"


def test_models_answer_at_once_too(gateway, client):
    vectors = client.create_embeddings(model="vectors", input=["one", "two"])
    assert [row.index for row in vectors.data] == [0, 1]
    with http(gateway) as plain:
        answer = plain.post("/sference/v1/chat/completions", json=HI)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
        wrong = plain.post("/sference/v1/chat/completions", json=HI | {"temperature": 3})
        assert problem(wrong)[1] == "temperature"
        assert problem(plain.get("/sference/v1/models/fake/x"), 404)[1] == "model"
        assert plain.get("/sference/v1/models/fake").json()["provider"] == "llm-engine"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/sference/v1/messages", 501, "not served here yet"),
        ("POST", "/sference/v1/oauth/token", 501, "not served here yet"),
        ("POST", "/sference/v1/auth/login", 501, "not served here yet"),
        ("GET", "/sference/v1/streams/stream_1/events", 404, "Invalid URL"),
        ("PUT", "/sference/v1/responses", 405, "Not allowed"),
        ("GET", "/sference/v1/decisions", 405, "takes POST"),
        ("GET", "/sference/v1/nothing", 404, "Invalid URL"),
        ("GET", "/sference", 404, "Invalid URL"),
        ("GET", "/sference/v1/batches/", 404, "Invalid URL"),
        ("DELETE", "/sference/v1/batches", 405, "Not allowed"),
        ("GET", "/sference/v1/embeddings", 405, "takes POST"),
    ],
)
def test_what_is_not_there_is_said_in_this_dialect(gateway, method, path, status, words):
    with http(gateway) as plain:
        answer = plain.request(method, path, headers={"content-type": "application/json"})
    assert words in problem(answer, status)[0]
