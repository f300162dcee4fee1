"""What a gateway does about responses in the background when a model, or itself, goes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from openai import OpenAI

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
