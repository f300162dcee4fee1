"""/sference-legacy over plain HTTP: what sference-sdk 0.0.1 to 0.0.6 read, which need a newer
Python than this project has."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import KEY, http, problem
from tests.support.upstream import new_key

ASKED = {"model": "fake", "input": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayThread]:
    endpoints = [fake_endpoint("fake")]
    limits = {"responses": {"max_wait_s": 2.0}}
    with GatewayThread(endpoints, api_keys=[KEY], sections=limits) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[httpx.Client]:
    with http(gateway) as made:
        made.base_url = f"{gateway.url}/sference-legacy/v1/"
        yield made


def test_a_response_has_flat_items(client: httpx.Client):
    answer = client.post("responses", json=ASKED | {"max_output_tokens": 2})
    assert answer.status_code == 200
    made = answer.json()
    assert made["status"] == "completed" and made["object"] == "response"
    assert made["output"] == [{"type": "output_text", "text": "word word "}]
    assert set(made["usage"]) >= {"input_tokens", "output_tokens", "total_tokens"}
    assert client.get(f"responses/{made['id']}").json()["output"] == made["output"]
    assert client.delete(f"responses/{made['id']}").json()["status"] == "completed"
    (row, *_) = client.get("responses", params={"limit": 100}).json()["data"]
    assert row == {key: made[key] for key in ("id", "object", "created_at", "model", "status")}


def test_a_stream_has_its_events(client: httpx.Client):
    made = client.post("streams", json={"name": "mail", "window": "1h"}).json()
    asked = {"metadata": {"stream_id": made["id"], "completion_window": "1h", "custom_id": "a"}}
    sent = client.post("responses", json=ASKED | asked).json()
    assert (sent["status"], sent["output"]) == ("in_progress", None)

    def page(**asked: Any) -> Any:
        return client.get(f"streams/{made['id']}/events", params=asked).json()

    first = page(limit=20, wait_ms=1900)
    assert (first["object"], first["has_more"]) == ("list", False)
    (event,) = first["data"]
    assert (event["custom_id"], event["status"]) == ("a", "completed")
    assert event["result"]["choices"][0]["message"]["content"] == "word " * 16
    assert page(starting_after=event["completion_id"])["data"] == []
    elsewhere = client.get("responses/events", params={"stream_id": made["id"]}).json()
    assert elsewhere["data"] == [event]
    wrong = client.get(f"streams/{made['id']}/events", params={"starting_after": "x"})
    assert problem(wrong)[1] == "starting_after"
    assert problem(client.get("streams/stream_0/events"), 404)

    def ended() -> bool:
        return client.get(f"streams/{made['id']}").json()["completed_items"] == 1

    eventually(ended, 15)
    closed = client.patch(f"streams/{made['id']}", json={"status": "cancelled"})
    assert closed.json()["status"] == "cancelled"
    assert problem(client.post("responses", json=ASKED | asked), 409)[1] == "stream_id"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stream": True}, "stream"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"metadata": {"completion_window": "15m"}}, "metadata.completion_window"),
    ],
)
def test_what_its_clients_cannot_read_is_refused(
    client: httpx.Client, asked: dict[str, Any], param: str
):
    assert problem(client.post("responses", json=ASKED | asked))[1] == param


def test_the_password_is_a_key(gateway: GatewayThread):
    key = new_key(gateway, KEY, "ann")
    with gateway.client(base_url=f"{gateway.url}/sference-legacy/v1/") as nobody:
        for password, role in ((KEY, "admin"), (key, "user")):
            answer = nobody.post("auth/login", json={"username": "me", "password": password})
            assert answer.status_code == 200, answer.text
            told = answer.json()
            assert (told["access_token"], told["token_type"]) == (password, "bearer")
            assert told["user"]["role"] == role
            assert all(isinstance(value, str) for value in told["user"].values())
            bearer = {"authorization": f"Bearer {told['access_token']}"}
            assert nobody.get("auth/me", headers=bearer).json()["username"] == told["user"]["id"]
        wrong = nobody.post("auth/login", json={"username": "me", "password": "sk-wrong"})
        assert "Incorrect" in problem(wrong, 401)[0]
        assert problem(nobody.post("auth/login", json={"username": "me"}))[1] == "password"
        more = {"username": "a", "password": "b", "otp": "c"}
        assert problem(nobody.post("auth/login", json=more))[1] == "otp"
        assert problem(nobody.get("auth/me"), 401)
        assert problem(nobody.get("auth/login"), 501)


def test_a_wrong_key_does_not_keep_one_from_logging_in(gateway: GatewayThread):
    """The client sends what it had before."""
    with http(gateway, "sk-old") as old:
        asked = {"username": "me", "password": KEY}
        answer = old.post("/sference-legacy/v1/auth/login", json=asked)
    assert answer.status_code == 200, answer.text
