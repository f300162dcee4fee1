"""What a gateway does about responses in the background when a model, or itself, goes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai import OpenAI

from llm_engine.api.auth import make_key
from llm_engine.api.http import Call
from llm_engine.api.replicas import Replicas
from llm_engine.errors import EngineFailed, Unavailable
from llm_engine.records import Scope
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint

RUNNING = 2  # at a time


@pytest.fixture
def gateway() -> Iterator[GatewayThread]:
    engines = [
        fake_endpoint("fake"),
        fake_endpoint("other"),
        fake_endpoint("slow", vllm_args={"token_delay_s": 0.05}),
    ]
    with GatewayThread(engines, sections={"responses": {"max_running": RUNNING}}) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread) -> Iterator[OpenAI]:
    with gateway.openai("none") as made:
        yield made


def key_of(gateway: GatewayThread, owner: str) -> str:
    record, key = make_key(owner, "test", (Scope.INFERENCE,), None)
    gateway.services.store.keys.add(record, 1000)
    return key


def ask(client: OpenAI, model: str, tokens: int = 2) -> str:
    made = client.responses.create(
        model=model, input="hello", background=True, max_output_tokens=tokens
    )
    return made.id


def is_done(client: OpenAI, response: str) -> bool:
    return client.responses.retrieve(response).status == "completed"


def test_a_model_that_is_away_keeps_nobody_elses_waiting(gateway: GatewayThread, client: OpenAI):
    table = gateway.services.balancer.table
    without = {name: them for name, them in table.replicas.items() if name != "other"}
    away = replace(table, version=table.version + 1, replicas=without)
    gateway.loop.call_soon_threadsafe(gateway.services.update, away, None)
    waiting = [ask(client, "other") for _ in range(3 * RUNNING)]
    for response in [ask(client, "fake") for _ in range(3 * RUNNING)]:
        eventually(lambda r=response: is_done(client, r), 20)
    assert not any(is_done(client, response) for response in waiting)
    back = replace(table, version=away.version + 1)
    gateway.loop.call_soon_threadsafe(gateway.services.update, back, None)
    for response in waiting:
        eventually(lambda r=response: is_done(client, r), 60)
        assert gateway.services.store.responses.get(response).starts == 1


def test_one_that_engines_are_lost_over_has_failed_in_the_end(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
):
    async def lost(*_: Any) -> None:
        raise EngineFailed("It was lost.", status=503)

    monkeypatch.setattr(Replicas, "serve", lost)
    made = ask(client, "other")
    eventually(lambda: client.responses.retrieve(made).status == "failed", 30)
    assert "responses.max_attempts" in client.responses.retrieve(made).error.message


def test_one_owners_absent_model_keeps_no_other_owners_waiting(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
):
    """They may have the same name."""
    serve = Replicas.serve

    async def serve_bob(self: Replicas, call: Call, *asked: Any) -> None:
        if call.principal.owner == "ann":
            raise Unavailable("Ann's model is away.")
        await serve(self, call, *asked)

    monkeypatch.setattr(Replicas, "serve", serve_bob)
    ann, bob = (gateway.openai(key_of(gateway, owner)) for owner in ("ann", "bob"))
    waiting = [ask(ann, "other") for _ in range(2 * RUNNING)]
    for response in [ask(bob, "other") for _ in range(2 * RUNNING)]:
        eventually(lambda r=response: is_done(bob, r), 20)
    assert not any(is_done(ann, response) for response in waiting)


def test_a_gateway_that_retires_ends_what_it_has_and_takes_up_nothing_more(
    gateway: GatewayThread, client: OpenAI
):
    running = ask(client, "slow", 60)
    eventually(lambda: client.responses.retrieve(running).status == "in_progress", 10)
    gateway.loop.call_soon_threadsafe(gateway.app.retire, 60)
    waiting = ask(client, "fake")
    eventually(lambda: is_done(client, running), 20)
    assert client.responses.retrieve(waiting).status == "queued"


def test_what_a_retiring_gateway_does_not_end_in_time_is_anybodys(
    gateway: GatewayThread, client: OpenAI
):
    running = ask(client, "slow", 2000)
    eventually(lambda: client.responses.retrieve(running).status == "in_progress", 10)
    gateway.loop.call_soon_threadsafe(gateway.app.retire, 0.5)
    eventually(lambda: client.responses.retrieve(running).status == "queued", 20)
    assert gateway.services.store.responses.get(running).starts == 0
    eventually(lambda: gateway.load("slow").depth == 0, 15)


def test_a_stream_that_was_cancelled_before_anybody_began_has_an_end(client: OpenAI):
    for _ in range(RUNNING):
        ask(client, "slow", 1000)
    asked = {"model": "fake", "input": "hi", "background": True, "stream": True}
    stream = client.responses.create(**asked)
    created, queued = next(stream), next(stream)
    client.responses.cancel(created.response.id)
    (last,) = stream
    assert (last.type, last.response["status"]) == ("response.cancelled", "cancelled")
    assert last.sequence_number == queued.sequence_number + 1
    name = created.response.id
    again = list(client.responses.retrieve(name, stream=True))
    assert [event.type for event in again] == [created.type, queued.type, last.type]
    assert not list(client.responses.retrieve(name, stream=True, starting_after=2))
