"""sference's streams, driven by its own clients and its command line."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sference_sdk import SferenceClient
from sference_sdk.client import ApiError

from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import (
    KEY,
    client_of,
    http,
    old_client,
    problem,
    sference,
    sference_lines,
)
from tests.support.upstream import new_key


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    endpoints = [fake_endpoint("fake"), fake_endpoint("slow", vllm_args={"token_delay_s": 0.02})]
    limits = {"responses": {"max_wait_s": 2.0, "max_running": 2, "max_streams": 50}}
    with GatewayThread(endpoints, api_keys=[KEY], sections=limits) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[SferenceClient]:
    """Of somebody who has nothing yet."""
    with client_of(gateway, new_key(gateway, KEY, f"ann-{time.time_ns()}")) as made:
        yield made


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("SFERENCE_STREAM_CHECKPOINTS", str(tmp_path / "checkpoints.json"))


def put(client: SferenceClient, stream: str, model: str = "fake", **asked: Any) -> str:
    metadata = {"stream_id": stream} | asked.pop("metadata", {})
    made = client.create_response(model=model, input="hi", metadata=metadata, **asked)
    assert (made.status, made.output) == ("in_progress", None)
    return made.id


def drained(client: SferenceClient, stream: str) -> Any:
    def ended() -> Any:
        found = client.get_stream(stream)
        return found.pending_items + found.running_items == 0 and found

    return eventually(ended, 20, 0.05)


def test_a_stream_from_its_first_response_to_its_archive(client: SferenceClient):
    made = client.create_stream("mail")
    assert (made.status, made.window, made.name) == ("open", "24h", "mail")
    assert (made.total_items, made.completion_ratio, made.latest_completion_id) == (0, 0.0, None)
    inside = [put(client, made.id, metadata={"custom_id": str(n)}) for n in range(4)]
    outside = client.create_response(model="fake", input="hi").id
    full = drained(client, made.id)
    assert (full.total_items, full.completed_items, full.completion_ratio) == (4, 4, 1.0)
    assert (full.total_prompt_tokens, full.total_completion_tokens, full.total_tokens) == (
        4,
        64,
        68,
    )
    events = list(client.iter_responses_events(stream_id=made.id))
    assert sorted(event.response_id for event in events) == inside
    assert sorted(event.custom_id for event in events) == ["0", "1", "2", "3"]
    assert full.latest_completion_id == events[-1].completion_id
    assert full.last_completion_at == events[-1].completed_at
    assert [e.response_id for e in client.list_responses_events().data] == [outside]
    listed = client.list_responses(stream_id=made.id)
    assert [row.id for row in listed.data] == inside[::-1]
    assert len(client.list_responses().data) == 5
    more = put(client, made.id)
    waited = client.list_responses_events(
        stream_id=made.id, starting_after=events[-1].completion_id, wait_ms=1900
    )
    assert [event.response_id for event in waited.data] == [more]
    archived = client.archive_stream(made.id)
    assert archived.status == "archived" and archived.archived_at and not archived.cancelled_at
    with pytest.raises(ApiError, match=r"^409: .*archived"):
        put(client, made.id)
    with pytest.raises(ApiError, match=r"^409: .*archived"):
        client.cancel_stream(made.id)
    assert [stream.id for stream in client.list_streams().items] == [made.id]


def test_a_cancelled_stream_ends_what_has_begun_and_nothing_else(
    gateway: GatewayThread, client: SferenceClient
):
    made = client.create_stream("mail")
    inside = [put(client, made.id, "slow", max_output_tokens=60) for _ in range(6)]
    eventually(lambda: client.get_stream(made.id).running_items == 2, 15)
    cancelled = client.cancel_stream(made.id)
    assert (cancelled.status, cancelled.pending_items) == ("cancelled", 0)
    assert cancelled.cancelled_at is not None
    with pytest.raises(ApiError, match=r"^409: .*cancelled"):
        put(client, made.id)
    end = drained(client, made.id)
    assert (end.completed_items, end.cancelled_items, end.completion_ratio) == (2, 4, 1.0)
    told = {e.response_id: e.status for e in client.list_responses_events(stream_id=made.id).data}
    assert set(told) == set(inside) and sorted(told.values()).count("cancelled") == 4
    assert client.cancel_stream(made.id).status == "cancelled"
    assert client.archive_stream(made.id).status == "archived"


def test_windows_are_the_mounts(gateway: GatewayThread, client: SferenceClient, tmp_path):
    """0.3.2 refuses a whole list for one stream of an hour."""
    legacy = "/sference-legacy/v1/streams"
    with http(gateway, client._token) as plain:
        hour = plain.post(legacy, json={"name": "hour", "window": "1h"})
        assert hour.status_code == 201 and hour.json()["window"] == "1h"
        day = client.create_stream("day", "24h").id
        assert [row["id"] for row in plain.get(legacy).json()["items"]] == [day, hour.json()["id"]]
        for window in ("1h", "15m", "", None):
            asked = {"name": "x", "window": window}
            assert problem(plain.post("/sference/v1/streams", json=asked))[1] == "window"
        assert problem(plain.post(legacy, json={"name": "x", "window": "15m"}))[1] == "window"
        assert plain.get(f"{legacy}/{day}").json()["total_items"] == 0
    assert [stream.id for stream in client.list_streams().items] == [day]
    for ask in (client.get_stream, client.archive_stream, lambda i: put(client, i)):
        with pytest.raises(ApiError, match=r"^404: .*sference-legacy"):
            ask(hour.json()["id"])
    (old,) = old_client(f"{gateway.url}/sference", client._token, tmp_path, ["list_streams", {}])
    assert [row["id"] for row in old["items"]] == [day]


def test_the_client_of_last_year_does_the_same(gateway: GatewayThread, tmp_path):
    url = f"{gateway.url}/sference"
    (made,) = old_client(url, KEY, tmp_path, ["create_stream", {"name": "old"}])
    this = {"stream_id": made["id"]}
    asked = {"model": "fake", "input": "hi", "metadata": this}
    put_in, found, events, ended = old_client(
        url, KEY, tmp_path, ["create_response", asked], ["get_stream", this],
        ["list_responses_events", this | {"wait_ms": 1900}], ["cancel_stream", this],
    )  # fmt: skip
    assert put_in["status"] == "in_progress" and found["total_items"] == 1
    assert [event["response_id"] for event in events["data"]] == [put_in["id"]]
    assert ended["status"] == "cancelled"


def test_what_another_owner_has_made_does_not_exist(gateway: GatewayThread, client: SferenceClient):
    made = client.create_stream("hers").id
    with client_of(gateway, new_key(gateway, KEY, "bob")) as bobs:
        for stream in (made, "stream_0", "a%00b"):
            for call in (bobs.get_stream, bobs.cancel_stream, bobs.archive_stream):
                with pytest.raises(ApiError, match=r"^404: "):
                    call(stream)
        for call in (bobs.list_responses, bobs.list_responses_events):
            with pytest.raises(ApiError, match=r"^404: "):
                call(stream_id=made)
        with pytest.raises(ApiError, match=r"^404: "):
            put(bobs, made)
        assert bobs.list_streams().items == []
    with client_of(gateway) as admin:  # who sees all, and is not her
        assert admin.get_stream(made).name == "hers"
        with pytest.raises(ApiError, match=r"^403: "):
            put(admin, made)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": 5}, "name"),
        ({"name": "x", "size": 1}, "size"),
    ],
)
def test_a_wrong_stream_is_told_what_is_wrong(
    gateway: GatewayThread, asked: dict[str, Any], param: str
):
    with http(gateway) as plain:
        assert problem(plain.post("/sference/v1/streams", json=asked))[1] == param


def test_a_wrong_change_is_refused(gateway: GatewayThread, client: SferenceClient):
    url = f"/sference/v1/streams/{client.create_stream('x').id}"
    with http(gateway, client._token) as plain:
        for asked in ({"status": "open"}, {"status": None}, {}):
            assert problem(plain.patch(url, json=asked))[1] == "status"
        assert problem(plain.patch(url, json={"status": "cancelled", "name": "y"}))[1] == "name"
        assert problem(plain.delete(url), 405)


def test_an_owner_has_a_limit(client: SferenceClient):
    made = [client.create_stream("x").id for _ in range(50)]
    with pytest.raises(ApiError, match=r"^409: .*max_streams"):
        client.create_stream("x")
    client.archive_stream(made[0])
    client.create_stream("x")


# -- the command line


def test_the_command_line_asks_and_fetches(gateway: GatewayThread, tmp_path):
    asked = ("responses", "create", "--content", "hi", "--model")
    now = json.loads(sference(gateway.url, tmp_path, *asked, "fake"))
    assert now["output"][0]["content"][0]["text"] == "word " * 16
    later = json.loads(sference(gateway.url, tmp_path, *asked, "slow", "--background"))
    assert (later["status"], later["output"]) == ("in_progress", None)
    got = json.loads(sference(gateway.url, tmp_path, "responses", "result", "--id", later["id"]))
    assert got["status"] == "completed"


def test_the_command_line_fills_a_stream_and_tails_it(
    gateway: GatewayThread, client: SferenceClient, tmp_path
):
    key = client._token

    def run(*arguments: Any) -> Any:
        return json.loads(sference(gateway.url, tmp_path, "stream", *arguments, "--json", key=key))

    made = run("create", "--name", "mail")["id"]
    this = ("--stream-id", made)
    assert [row["id"] for row in run("list")["items"]] == [made]
    given = tmp_path / "rows.jsonl"
    given.write_text(
        '{"content": "hi"}\n{"input": [{"role": "user", "content": "ho"}], '
        '"metadata": {"custom_id": "b"}}\n'
    )
    sent = run("submit", *this, "--input-file", given, "--model", "fake")
    assert [item["status"] for item in sent["items"]] == ["in_progress"] * 2
    drained(client, made)
    assert run("status", *this)["completed_items"] == 2
    tail = ("responses", "tail", *this, "--poll-interval", "0.5")
    with sference_lines(gateway.url, tmp_path, *tail, key=key) as lines:
        seen = [json.loads(next(lines)) for _ in range(2)]
        assert {row["response_id"] for row in seen} == {item["id"] for item in sent["items"]}
        assert {row["custom_id"] for row in seen} == {None, "b"}
        # Without a checkpoint it goes on from the older of the two: it repeats the newer one.
        assert json.loads(next(lines))["response_id"] == seen[0]["response_id"]
        more = put(client, made)
        assert json.loads(next(lines))["response_id"] == more
    assert run("cancel", *this)["status"] == "cancelled"
    assert run("archive", *this)["status"] == "archived"
