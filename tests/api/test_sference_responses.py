"""sference's responses and their feed, driven by its own clients."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from sference_sdk import AsyncSferenceClient, SferenceClient
from sference_sdk.client import ApiError

from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import KEY, client_of, http, old_client, problem
from tests.support.upstream import new_key

WAIT_S = 3.0
URL = "/sference/v1/responses"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    endpoints = [
        fake_endpoint("fake"),
        fake_endpoint("slow", vllm_args={"token_delay_s": 0.02}),
        fake_endpoint("vectors", task="embed"),
    ]
    limits = {"responses": {"max_wait_s": WAIT_S}}
    with GatewayThread(endpoints, api_keys=[KEY], sections=limits) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[SferenceClient]:
    """Of somebody who has nothing yet."""
    with client_of(gateway, new_key(gateway, KEY, f"ann-{time.time_ns()}")) as made:
        yield made


def done(client: SferenceClient, response: str) -> Any:
    return client.wait_for_response(response, poll_interval=0.02, timeout=20)


def ids(page: Any) -> list[str | None]:
    return [event.response_id for event in page.data]


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("SFERENCE_STREAM_CHECKPOINTS", str(tmp_path / "checkpoints.json"))


# -- asked and answered


def test_a_response_is_answered_while_the_client_waits(client: SferenceClient):
    made = client.create_response(
        model="fake", input="hi", instructions="Be brief.", max_output_tokens=3, temperature=0.5,
        top_p=0.9, include_reasoning=False, enable_thinking=False,
        metadata={"any": [1, {"a": None}]},
    )  # fmt: skip
    assert (made.status, made.model) == ("completed", "fake")
    assert made.output is not None and made.usage is not None
    (message,) = made.output
    assert message.type == "message" and message.id
    assert [part.text for part in message.content] == ["word word word "]
    assert (made.usage.input_tokens, made.usage.output_tokens) == (1, 3)
    assert client.get_response(made.id) == made


@pytest.mark.parametrize(
    "asked",
    [
        {"background": True},
        {"metadata": {"completion_window": "24h"}},
        {"background": True, "metadata": {"completion_window": "24h", "custom_id": "c"}},
    ],
)
def test_it_is_answered_later(client: SferenceClient, asked: dict[str, Any]):
    made = client.create_response(model="slow", input=[{"role": "user", "content": "hi"}], **asked)
    assert (made.status, made.output, made.usage) == ("in_progress", None, None)
    with pytest.raises(TimeoutError):
        client.wait_for_response(made.id, poll_interval=0.01, timeout=0.02)
    ended = done(client, made.id)
    assert ended.status == "completed" and ended.output[0].content[0].text == "word " * 16


def test_one_that_takes_too_long_is_cancelled(gateway: GatewayThread, client: SferenceClient):
    began = time.monotonic()
    with pytest.raises(ApiError, match=r"^504: .*max_wait_s.*background"):
        client.create_response(model="slow", input="hi", max_output_tokens=1000)
    assert WAIT_S <= time.monotonic() - began < WAIT_S + 10
    eventually(lambda: gateway.load("slow").depth == 0, 15)
    assert client.list_responses().data == []


def test_cancelled_it_stays_readable(gateway: GatewayThread, client: SferenceClient):
    made = client.create_response(model="slow", input="hi", max_output_tokens=1000, background=True)
    eventually(lambda: gateway.load("slow").depth == 1, 15)
    assert client.cancel_response(made.id).status == "cancelled"
    assert client.get_response(made.id).status == "cancelled"
    assert client.cancel_response(made.id).status == "cancelled"
    eventually(lambda: gateway.load("slow").depth == 0, 15)


def test_a_finished_one_is_not_changed_by_its_cancellation(client: SferenceClient):
    made = client.create_response(model="fake", input="hi")
    assert client.cancel_response(made.id) == made == client.get_response(made.id)


def test_lists_are_newest_first(client: SferenceClient):
    made = [client.create_response(model="fake", input="hi").id for _ in range(3)]
    page = client.list_responses(limit=2)
    assert [row.id for row in page.data] == made[:0:-1] and page.has_more
    whole = client.list_responses()
    assert [row.id for row in whole.data] == made[::-1] and not whole.has_more
    assert {row.status for row in whole.data} == {"completed"}


def test_it_goes_on_from_another_and_is_seen_in_openais_dialect(
    gateway: GatewayThread, client: SferenceClient
):
    first = client.create_response(model="fake", input="hi", metadata={"n": 1})
    with http(gateway, client._token) as plain:
        body = {"model": "fake", "input": "and?", "previous_response_id": first.id}
        assert plain.post(URL, json=body).json()["usage"]["input_tokens"] == 3
    with gateway.openai(client._token) as there:
        assert there.responses.retrieve(first.id).output_text == "word " * 16
        theirs = there.responses.create(model="fake", input="hi", background=True)
        assert done(client, theirs.id).status == "completed"
        assert theirs.id in ids(client.list_responses_events())
        there.responses.delete(first.id)
    with pytest.raises(ApiError, match=r"^404: "):
        client.get_response(first.id)


def test_a_stream_is_openais(gateway: GatewayThread):
    with OpenAI(base_url=f"{gateway.url}/sference/v1", api_key=KEY, max_retries=0) as client:
        events = list(client.responses.create(model="fake", input="hi", stream=True))
        assert events[0].type == "response.created" and events[-1].type == "response.completed"
        assert client.responses.retrieve(events[0].response.id).output_text == "word " * 16


def test_an_idempotency_key_makes_one(gateway: GatewayThread):
    body = {"model": "fake", "input": "hi", "background": True}
    with http(gateway) as plain:
        asked = [
            plain.post(URL, json=body, headers={"idempotency-key": "k"}).json() for _ in range(2)
        ]
    assert asked[0]["id"] == asked[1]["id"]


def test_the_async_client_does_the_same(gateway: GatewayThread):
    async def live() -> None:
        client = AsyncSferenceClient(base_url=f"{gateway.url}/sference", api_key=KEY)
        try:
            made = await client.create_response(model="fake", input="hi", background=True)
            ended = await client.wait_for_response(made.id, poll_interval=0.02, timeout=20)
            assert ended.status == "completed"
            assert (await client.cancel_response(made.id)).status == "completed"
            assert made.id in [row.id for row in (await client.list_responses()).data]
            assert made.id in ids(await client.list_responses_events())
        finally:
            await client.aclose()

    asyncio.run(live())


def test_the_client_of_last_year_does_the_same(gateway: GatewayThread, tmp_path):
    url = f"{gateway.url}/sference"
    asked = {"model": "fake", "input": "hi", "metadata": {"custom_id": "old"}}
    now, later = old_client(url, KEY, tmp_path, ["create_response", asked],
                            ["create_response", asked | {"background": True}])  # fmt: skip
    assert now["output"][0]["content"][0]["text"] == "word " * 16 and later["output"] is None
    ended, cancelled, listed, events = old_client(
        url, KEY, tmp_path,
        ["wait_for_response", {"response_id": later["id"], "poll_interval": 0.05}],
        ["cancel_response", {"response_id": now["id"]}], ["list_responses", {}],
        ["list_responses_events", {}],
    )  # fmt: skip
    assert ended["status"] == cancelled["status"] == "completed"
    assert {now["id"], later["id"]} <= {row["id"] for row in listed["data"]}
    assert {now["id"], later["id"]} <= {event["response_id"] for event in events["data"]}


# -- what is wrong


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include_reasoning": "yes"}, "include_reasoning"),
        ({"enable_thinking": 1}, "enable_thinking"),
        ({"background": "yes"}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"completion_window": "24h"}, "store": False}, "store"),
        ({"background": True, "stream": True}, "stream"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {str(n): n for n in range(65)}}, "metadata"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata"),
        ({"metadata": {"a": DEEP}}, "metadata"),
        ({"metadata": {"a": [DEEP, DEEP]}, "background": True}, "metadata"),
        ({"metadata": {"custom_id": 5}}, "metadata.custom_id"),
        ({"metadata": {"custom_id": "a\0b"}}, "metadata.custom_id"),
        ({"metadata": {"custom_id": "x" * 513}}, "metadata.custom_id"),
        ({"metadata": {"stream_id": ""}}, "metadata.stream_id"),
        ({"metadata": {"completion_window": "1h"}}, "metadata.completion_window"),
        ({"metadata": {"completion_window": {}}}, "metadata.completion_window"),
        ({"model": "vectors"}, "model"),
        ({"model": "vectors", "background": True}, "model"),
        ({"previous_response_id": "no"}, "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    gateway: GatewayThread, asked: dict[str, Any], param: str
):
    with http(gateway) as plain:
        assert problem(plain.post(URL, json={"model": "fake", "input": "hi"} | asked))[1] == param


def test_nested_too_deeply_is_no_mistake_of_the_servers(gateway: GatewayThread):
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    tool = {"type": "function", "name": "f", "parameters": deep}
    with http(gateway) as plain:
        for path in (URL, "/v1/responses"):
            for background in (False, True):
                body = {"model": "fake", "input": "hi", "tools": [tool], "background": background}
                answer = plain.post(path, json=body)
                assert answer.status_code == 400 and "nested" in answer.text


def test_other_bodies_are_refused(gateway: GatewayThread):
    with http(gateway) as plain:
        assert "JSON" in problem(plain.post(URL, content=b"{"))[0]
        assert "object" in problem(plain.post(URL, content=b"[]"))[0]
        assert problem(plain.get(URL, params={"limit": 101}))[1] == "limit"
        unknown = plain.post(URL, json={"model": "none", "input": "hi", "background": True})
        assert problem(unknown, 404)[1] == "model"


def test_what_another_owner_has_made_does_not_exist(gateway: GatewayThread, client: SferenceClient):
    made = client.create_response(model="fake", input="hi")
    with client_of(gateway, new_key(gateway, KEY, "bob")) as bobs:
        for response in (made.id, "resp_0", "a%00b"):
            for call in (bobs.get_response, bobs.cancel_response):
                with pytest.raises(ApiError, match=r"^404: "):
                    call(response)
        assert made.id not in [row.id for row in bobs.list_responses().data]
        assert made.id not in ids(bobs.list_responses_events(limit=100))
    with client_of(gateway) as admin:  # who sees everybody's
        assert made.id in ids(admin.list_responses_events())


# -- the feed


def test_pages_of_the_feed(client: SferenceClient):
    made = [
        client.create_response(model="fake", input="hi", metadata={"custom_id": str(n)}).id
        for n in range(5)
    ]
    newest = client.list_responses_events(limit=2)
    assert ids(newest) == made[:2:-1] and newest.has_more  # newest first
    assert [event.custom_id for event in newest.data] == ["4", "3"]
    whole = client.list_responses_events()
    assert ids(whole) == made[::-1] and not whole.has_more
    cursors = [event.completion_id for event in reversed(whole.data)]
    assert cursors == sorted(set(cursors))
    after = client.list_responses_events(starting_after=cursors[0], limit=2)
    assert ids(after) == made[1:3] and after.has_more  # oldest first
    rest = client.list_responses_events(starting_after=cursors[2], limit=2)
    assert ids(rest) == made[3:] and not rest.has_more
    before = client.list_responses_events(ending_before=cursors[3], limit=2)
    assert ids(before) == [made[2], made[1]] and before.has_more  # newest first
    assert client.list_responses_events(starting_after=cursors[-1]).data == []
    event = whole.data[0]
    assert event.status == "completed" and event.result is not None
    assert event.result["choices"][0]["message"]["content"] == "word " * 16
    assert (event.prompt_tokens, event.completion_tokens, event.total_tokens) == (1, 16, 17)


def test_a_checkpoint_misses_and_repeats_nothing(client: SferenceClient):
    made = [client.create_response(model="fake", input="hi").id for _ in range(3)]
    assert [event.response_id for event in client.iter_responses_events()] == made
    assert list(client.iter_responses_events()) == []
    more = [client.create_response(model="fake", input="hi").id for _ in range(105)]
    assert [event.response_id for event in client.iter_responses_events()] == more


def test_failed_and_cancelled_ones_are_told(gateway: GatewayThread, client: SferenceClient):
    made = client.create_response(model="slow", input="hi", max_output_tokens=1000, background=True)
    client.cancel_response(made.id)
    (event,) = client.list_responses_events(wait_ms=1500).data
    assert (event.response_id, event.status, event.result) == (made.id, "cancelled", None)


def test_a_cursor_outlives_its_event(gateway: GatewayThread, client: SferenceClient):
    made = [client.create_response(model="fake", input="hi").id for _ in range(2)]
    last = client.list_responses_events().data[0].completion_id
    with gateway.openai(client._token) as there:
        for response in made:
            there.responses.delete(response)
    assert client.list_responses_events(starting_after=last).data == []
    next_one = client.create_response(model="fake", input="hi")
    assert ids(client.list_responses_events(starting_after=last)) == [next_one.id]


def test_wrong_cursors_and_pages_are_refused(gateway: GatewayThread, client: SferenceClient):
    client.create_response(model="fake", input="hi")
    for cursor in ("cmpl_99999999999999999999", "cmpl_00000000000900000000", "evt_1", "", "cmpl_1"):
        for name in ("starting_after", "ending_before"):
            with pytest.raises(ApiError, match=rf"^400: .*{name}"):
                client.list_responses_events(**{name: cursor})
    known = "cmpl_" + "0" * 20
    with http(gateway) as plain:
        for asked, param in (
            ({"limit": 101}, "limit"),
            ({"limit": 0}, "limit"),
            ({"wait_ms": -1}, "wait_ms"),
            ({"wait_ms": "x"}, "wait_ms"),
            ({"starting_after": known, "ending_before": known}, "ending_before"),
        ):
            assert problem(plain.get(f"{URL}/events", params=asked))[1] == param
        unknown = plain.get(f"{URL}/events", params={"stream_id": "stream_0"})
        assert problem(unknown, 404)[1] == "stream_id"


def test_who_waits_is_told_at_once(client: SferenceClient):
    first = client.create_response(model="fake", input="hi")
    (event,) = client.list_responses_events().data
    told: list[tuple[float, Any]] = []

    def wait() -> None:
        page = client.list_responses_events(starting_after=event.completion_id, wait_ms=60_000)
        told.append((time.monotonic(), page))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    assert not told
    second = client.create_response(model="fake", input="hi")
    ended = time.monotonic()
    waiting.join(10)
    assert ids(told[0][1]) == [second.id] != [first.id]
    assert told[0][0] - ended < 2, "not before the wait was over"


@pytest.mark.parametrize("asked_ms", [60_000, 10**400])
def test_a_wait_has_an_end(gateway: GatewayThread, client: SferenceClient, asked_ms: int):
    began = time.monotonic()
    with http(gateway, client._token) as plain:
        page = plain.get(f"{URL}/events", params={"wait_ms": asked_ms})
    assert page.json() == {"object": "list", "data": [], "has_more": False}
    assert WAIT_S - 0.1 <= time.monotonic() - began < WAIT_S + 10
