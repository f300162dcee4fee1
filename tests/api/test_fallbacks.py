"""Aliases, and models that answer for others: over real sockets, with OpenAI's client."""

import asyncio
import dataclasses

import pytest

from llm_engine.endpoints import OPERATOR
from llm_engine.records import Principal, RoutingTable
from tests.api.test_gateway import open_stream
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.upstream import (
    EVENTS,
    KEY,
    QUESTION,
    Upstream,
    chat,
    client_of,
    failing,
    gateway_with_registry,
    good,
    last_event,
    metric,
    new_key,
    openai_of,
    register,
    silent,
    streaming,
)


@pytest.fixture(scope="module")
def upstream():
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(upstream):
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed")]
    with gateway_with_registry(endpoints, api_keys=[KEY], request_timeout_s=2) as running:
        register(running, "ext", KEY, url=upstream.url, model="theirs")
        register(running, "alias", KEY, model="fake")
        register(running, "alias-vectors", KEY, model="vectors")
        yield running


@pytest.fixture(autouse=True)
def fresh(upstream):
    upstream.reset()


# -- aliases


def test_openai_clients_call_an_alias_by_its_name(gateway):
    with openai_of(gateway) as client:
        answer = client.chat.completions.create(model="alias", messages=QUESTION, max_tokens=2)
        text = client.completions.create(model="alias", prompt="hi", max_tokens=2)
        vectors = client.embeddings.create(model="alias-vectors", input=["a", "b"])
        stream = client.chat.completions.create(
            model="alias", messages=QUESTION, max_tokens=3, stream=True
        )
        chunks = list(stream)
        listed = {row.id for row in client.models.list()}
    assert answer.choices[0].message.content == "word word " and text.choices[0].text
    assert len(vectors.data) == 2
    assert answer.model == text.model == "alias" and vectors.model == "alias-vectors"
    assert [c.choices[0].delta.content for c in chunks] == ["word "] * 3
    assert {c.model for c in chunks} == {"alias"}
    assert {"alias", "alias-vectors", "ext", "fake"} <= listed


def test_an_alias_that_leads_nowhere_says_where(gateway):
    register(gateway, "lost", KEY, model="gone-model")
    answer = chat(gateway, "lost")
    assert answer.status_code == 404 and "'gone-model'" in answer.json()["error"]["message"]
    register(gateway, "only-a-name", KEY)
    assert chat(gateway, "only-a-name").status_code == 404


def test_an_alias_may_lead_to_an_external_model(gateway, upstream):
    register(gateway, "alias-ext", KEY, model="ext", max_output_token_count=1000)
    answer = chat(gateway, "alias-ext")
    assert answer.json()["model"] == "alias-ext"
    assert upstream.asked[0].body["model"] == "theirs"
    assert upstream.asked[0].body["max_tokens"] == 1000


# -- fallbacks


@pytest.mark.parametrize(
    "behave", [failing(500), failing(429), failing(401), silent, streaming(then="cut")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_where_the_upstream_cannot(gateway, upstream, behave, stream):
    if not any(
        m.name == "weak" for m in gateway.services.catalog.models(Principal(OPERATOR, frozenset()))
    ):
        register(gateway, "weak", KEY, url=upstream.url, fallback="fake")
    upstream.behave = behave
    answer = chat(gateway, "weak", max_tokens=2, stream=stream)
    assert answer.status_code == 200 and answer.headers["x-llm-engine-served-by"] == "fake"
    assert b'"model":"fake"' in answer.content and b"word" in answer.content


def test_a_fallback_has_the_whole_time_limit_to_itself(gateway, upstream):
    register(gateway, "never", KEY, url=upstream.url, fallback="later")
    register(gateway, "later", KEY, url=upstream.url)

    async def behave(asked, send):
        await asyncio.sleep(60 if asked.body["model"] == "never" else 0.2)
        await good(asked, send)

    upstream.behave = behave
    assert chat(gateway, "never").headers["x-llm-engine-served-by"] == "later"


def test_a_mistake_of_the_callers_does_not_fall_back(gateway, upstream):
    register(gateway, "strict", KEY, url=upstream.url, fallback="fake")
    upstream.behave = failing(400)
    answer = chat(gateway, "strict")
    assert answer.status_code == 400 and "x-llm-engine-served-by" not in answer.headers


def test_no_fallback_after_the_first_byte(gateway, upstream):
    register(gateway, "breaks", KEY, url=upstream.url, fallback="fake")
    upstream.behave = streaming(EVENTS[0], then="cut")
    answer = chat(gateway, "breaks", stream=True)
    assert "broke off" in last_event(answer)["error"]["message"]
    assert b"word" not in answer.content


def test_a_chain_of_three_is_followed_and_no_longer_one(gateway, upstream):
    for name, then in (("c1", "c2"), ("c2", "c3"), ("c3", "c4"), ("c4", None)):
        url = None if name in ("c3", "c4") else upstream.url
        model = {"c3": "fake", "c4": "fake"}.get(name)
        register(gateway, name, KEY, url=url, model=model, fallback=then)
    upstream.behave = failing(500)
    answer = chat(gateway, "c1")
    assert answer.headers["x-llm-engine-served-by"] == "c3" and answer.json()["model"] == "c3"
    with client_of(gateway) as client:
        rows = client.get("/rootsignals/v1/models/").json()["results"]
        c3 = next(row["id"] for row in rows if row["name"] == "c3")
        client.patch(f"/rootsignals/v1/models/{c3}/", json={"url": upstream.url})
    answer = chat(gateway, "c1")
    assert answer.status_code == 502 and "'c1'" in answer.json()["error"]["message"]
    assert len(upstream.asked) == 2 + 3


def test_a_circle_ends_with_the_first_ones_own_error(gateway, upstream):
    register(gateway, "ring-a", KEY, url=upstream.url, fallback="ring-b")
    register(gateway, "ring-b", KEY, url=upstream.url, fallback="ring-a")
    upstream.behave = failing(500)
    answer = chat(gateway, "ring-a")
    assert answer.status_code == 502 and "'ring-a'" in answer.json()["error"]["message"]
    assert "x-llm-engine-served-by" not in answer.headers
    assert len(upstream.asked) == 2


def test_a_fallback_that_its_owner_may_not_see_is_not_used(gateway, upstream):
    other = new_key(gateway, KEY, "team-a", "inference", "models")
    register(gateway, "secret", KEY, model="fake")  # the operator's, and private
    register(gateway, "hopeful", other, url=upstream.url, fallback="secret")
    upstream.behave = failing(500)
    with client_of(gateway, other) as client:
        body = {"model": "hopeful", "messages": QUESTION}
        assert client.post("/v1/chat/completions", json=body).status_code == 502


def test_an_endpoint_that_is_full_or_gone_falls_back_too():
    full = fake_endpoint("full", max_queue=1, vllm_args={"token_delay_s": 0.05})
    slow = fake_endpoint("slow", vllm_args={"token_delay_s": 2.5})
    limits = {"request_timeout_s": 2}
    with GatewayThread([full, slow, fake_endpoint("spare")], **limits) as gateway:
        change_endpoint(gateway, "full", fallback="spare")
        change_endpoint(gateway, "slow", fallback="spare")
        body = {"messages": QUESTION, "max_tokens": 2}
        busy = open_stream(gateway, body | {"model": "full", "stream": True, "max_tokens": 10000})
        busy.recv(100)
        with gateway.client() as client:
            for name in ("full", "slow"):
                answer = client.post("/v1/chat/completions", json=body | {"model": name})
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-llm-engine-served-by"] == "spare"
                assert answer.json()["model"] == "spare"
            busy.close()
            assert metric(gateway, "fallbacks_total", model="slow", answered_by="spare") == 1


def change_endpoint(gateway, name, **changes):
    async def change():
        table = gateway.services.balancer.table
        endpoints = table.endpoints | {name: dataclasses.replace(table.endpoints[name], **changes)}
        new = RoutingTable(table.version + 1, endpoints, table.replicas)
        gateway.services.update(new, None)

    asyncio.run_coroutine_threadsafe(change(), gateway.loop).result(5)
