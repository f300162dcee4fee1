"""Adapters by their names, over real sockets: fake engines, which load them all the same."""

import asyncio
import time
from collections import Counter

import httpx
import openai
import pytest

from llm_engine.api.auth import make_key
from llm_engine.records import ModelRecord, Scope
from tests.support.adapters import adapter, record, served
from tests.support.batches import Bench, jsonl, row
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint

ROOT = "sk-operator"
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def gateway():
    endpoints = [
        fake_endpoint("fake", max_adapters=2),
        fake_endpoint("slow", max_adapters=1, vllm_args={"token_delay_s": 0.05}),
        fake_endpoint("plain"),
    ]
    with GatewayThread(endpoints, api_keys=[ROOT], replicas=2) as running:
        yield running


def key_of(gateway: GatewayThread, owner: str) -> str:
    key, secret = make_key(owner, "test", (Scope.INFERENCE, Scope.FILES), None)
    gateway.services.store.keys.add(key, 1000)
    return secret


@pytest.fixture(scope="module")
def keys(gateway):
    return {owner: key_of(gateway, owner) for owner in ("ann", "bob")} | {"root": ROOT}


@pytest.fixture
def tuned(gateway, tmp_path):
    """One of ann's that can be asked, and that the gateway has not been told of."""
    services = gateway.services

    def make(name: str | None = None, **values):
        name = name or f"ft:fake:ann::{time.monotonic_ns()}"
        folder = tmp_path / f"{time.monotonic_ns()}"
        values = {"owner": "ann"} | values
        return served(services.store, services.storage, folder, name=name, **values)

    return make


def openai_of(gateway, key: str) -> openai.OpenAI:
    return gateway.openai(key)


@pytest.fixture
def ann(gateway, keys):
    with openai_of(gateway, keys["ann"]) as client:
        yield client


@pytest.fixture
def bob(gateway, keys):
    with openai_of(gateway, keys["bob"]) as client:
        yield client


@pytest.fixture
def root(gateway, keys):
    with openai_of(gateway, keys["root"]) as client:
        yield client


def chat(client: openai.OpenAI, model: str, **options):
    return client.chat.completions.create(
        model=model, messages=QUESTION, **{"max_tokens": 3} | options
    )


def loaded(gateway: GatewayThread, endpoint: str = "fake") -> list[tuple[str, ...]]:
    """By replica."""
    return [gateway.load(endpoint, i).adapters for i in range(2)]


# -- asking


def test_it_answers_by_its_name_from_the_moment_it_is_recorded(gateway, tuned, ann):
    one = tuned()
    answer = chat(ann, one.name)
    assert answer.model == one.name and answer.choices[0].message.content == "word word word "
    assert Counter(loaded(gateway)[0] + loaded(gateway)[1])[one.id] == 1


def test_streams_and_completions_call_it_by_its_name_too(tuned, ann):
    one = tuned()
    chunks = list(chat(ann, one.name, stream=True))
    assert {chunk.model for chunk in chunks} == {one.name} and len(chunks) == 3
    text = ann.completions.create(model=one.name, prompt="hi", max_tokens=2)
    assert text.model == one.name and text.choices[0].text == "word word "
    parts = list(ann.completions.create(model=one.name, prompt="hi", max_tokens=2, stream=True))
    assert {part.model for part in parts} == {one.name}


def test_scales_completions(gateway, keys, tuned):
    one = tuned(f"fake.suffix.{time.monotonic_ns()}")
    path = f"/llm-engine/v1/llm/completions-sync?model_endpoint_name={one.name}"
    with gateway.client(auth=(keys["ann"], "")) as http:
        answer = http.post(path, json={"prompt": "hi", "max_new_tokens": 2, "temperature": 0})
    assert answer.json()["output"]["text"] == "word word "
    with gateway.client(auth=(keys["bob"], "")) as http:
        answer = http.post(path, json={"prompt": "hi", "max_new_tokens": 2, "temperature": 0})
    assert answer.status_code == 404 and "could not be found" in answer.text


def test_it_exists_for_its_owner_and_for_admins_only(tuned, ann, bob, root):
    one = tuned()
    assert chat(root, one.name).model == one.name
    with pytest.raises(openai.NotFoundError) as hidden:
        chat(bob, one.name)
    assert hidden.value.code == "model_not_found" and "adapter" not in hidden.value.message
    for call in (bob.models.retrieve, bob.models.delete):
        with pytest.raises(openai.NotFoundError):
            call(one.name)
    assert one.name not in {model.id for model in bob.models.list()}
    assert chat(ann, one.name)


def test_its_row_among_the_models(tuned, ann, gateway, keys):
    one = tuned()
    row = ann.models.retrieve(one.name)
    assert one.name in {model.id for model in ann.models.list()}
    assert (row.id, row.object, row.owned_by) == (one.name, "model", "ann")
    assert row.created == int(one.created_at)
    assert row.parent == row.root == "fake" and row.status == "READY" and row.max_model_len == 8192
    with gateway.client(headers={"X-API-Key": keys["ann"]}) as http:
        rows = http.get("/sference/v1/models").json()["data"]
    assert one.name in {row["id"] for row in rows}


def test_an_alias_leads_to_it_for_those_it_is_made_for(gateway, tuned, ann, bob, keys):
    one = tuned()
    chat(ann, one.name)
    services = gateway.services
    services.store.registered.add(
        ModelRecord(f"mdl_{one.id}", "ann", "shared", model=one.name, public=True), 100
    )
    run(gateway, gateway.refresh())
    assert chat(bob, "shared").model == "shared"
    with pytest.raises(openai.NotFoundError):
        chat(bob, one.name)


def test_batches_ask_it_with_their_owners_eyes(gateway, tuned):
    one = tuned()
    bench = Bench(gateway.settings, [gateway.url])
    try:
        for owner, done in (("ann", 5), ("bob", 0)):
            file = bench.file(jsonl(row(i, model=one.name) for i in range(5)), owner)
            batch = bench.batch(b"", owner=owner, input_file_id=file)
            _, printed, ended = bench.run(batch)
            assert ended.completed == done, printed
            output, errors = bench.results(batch)
            if done:
                assert {line["response"]["body"]["model"] for line in output} == {one.name}
            else:
                assert errors == [] and ended.errors[0]["code"] == "model_not_found"
    finally:
        bench.close()


# -- deleting


def test_its_owner_deletes_it_and_it_is_gone(gateway, tuned, ann):
    one = tuned()
    chat(ann, one.name)
    assert ann.models.delete(one.name).to_dict() == {
        "id": one.name, "object": "model", "deleted": True,
    }  # fmt: skip
    for call in (lambda: chat(ann, one.name), lambda: ann.models.retrieve(one.name),
                 lambda: ann.models.delete(one.name)):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            call()
    assert [a.id for a in gateway.services.store.adapters.deleted() if a.id == one.id]


def test_what_an_endpoint_was_just_made_of_is_not_deleted(gateway, tuned, ann, root):
    one = tuned()
    with gateway.client(headers={"authorization": f"Bearer {root.api_key}"}) as client:
        made = client.post("/v1/endpoints", json={"name": "own", "model": one.name})
    assert made.status_code == 201, made.text
    with pytest.raises(openai.ConflictError, match="'own' is made of this model"):
        ann.models.delete(one.name)
    store = gateway.services.store
    store.endpoints.remove(store.endpoints.get("own"))
    ann.models.delete(one.name)


def test_what_is_no_adapter_is_not_deleted(gateway, ann, root, keys):
    for client in (ann, root):
        with pytest.raises(openai.PermissionDeniedError, match="no fine-tuned model"):
            client.models.delete("fake")
    with pytest.raises(openai.NotFoundError):
        ann.models.delete("nothing")
    key, secret = make_key("ann", "test", (Scope.INFERENCE,), None)
    gateway.services.store.keys.add(key, 1000)
    with pytest.raises(openai.PermissionDeniedError, match="scope"):
        openai_of(gateway, secret).models.delete("ft:x")


def test_deleted_while_it_answers(gateway, tuned, ann):
    one = tuned(base="slow")
    stream = chat(ann, one.name, stream=True, max_tokens=20)
    chunks = [next(stream)]
    ann.models.delete(one.name)
    holder = next(i for i in range(2) if one.id in gateway.load("slow", i).adapters)
    engine = gateway.engines["slow"][holder]
    run(gateway, engine.forget([one.id]))
    assert one.id in gateway.load("slow", holder).adapters, "it answers still"
    chunks += stream
    assert len(chunks) == 20, "what runs comes to its end"
    eventually(lambda: one.id not in gateway.load("slow", holder).adapters, 15)
    with pytest.raises(openai.NotFoundError):
        chat(ann, one.name)


# -- what goes wrong


def test_damaged_bytes_are_a_clear_error_and_hurt_nobody_else(gateway, tuned, ann):
    good, bad = tuned(), tuned()
    key = f"adapters/{bad.id}/adapter_model.safetensors"
    gateway.services.storage.put(key, b"x")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as failed:
            chat(ann, bad.name, stream=stream)
        assert failed.value.code == "adapter_broken" and failed.value.status_code == 500
        assert bad.name in failed.value.message and "damaged" in failed.value.message
    assert not gateway.services.balancer._suspects, "the engine is well"
    assert chat(ann, good.name) and chat(ann, "fake")
    gateway.services.storage.put(key, b"weights")
    assert chat(ann, bad.name).model == bad.name


def test_an_engine_that_cannot_load_it(gateway, tuned, ann):
    import json

    from llm_engine.fine_tunes import folders

    one = tuned()
    prefix = f"adapters/{one.id}"
    told = folders.manifest(gateway.services.storage, prefix)
    told["files"] = [f for f in told["files"] if f["name"] != "adapter_config.json"]
    gateway.services.storage.put(f"{prefix}/manifest.json", json.dumps(told).encode())
    with pytest.raises(openai.InternalServerError) as failed:
        chat(ann, one.name)
    assert failed.value.code == "adapter_broken"
    assert chat(ann, "fake")


def test_bytes_that_are_gone_are_as_a_model_that_is_gone(gateway, ann):
    one = adapter("ft:fake:ann::gone", owner="ann")
    record(gateway.services.store, one)
    with pytest.raises(openai.NotFoundError) as gone:
        chat(ann, one.name)
    assert gone.value.code == "model_not_found" and one.name in gone.value.message
    assert chat(ann, "fake")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": "plain"}, "'plain' serves none"),
        ({"base": "fake", "weights": "other"}, "trained on other, but 'fake' serves none now"),
        ({"base": "fake", "rank": 64}, "rank 64"),
    ],
)
def test_a_base_that_cannot_serve_it(tuned, ann, values, said):
    one = tuned(**values)
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        chat(ann, one.name)
    assert refused.value.code == "model_not_supported" and refused.value.param == "model"
    assert ann.models.retrieve(one.name).status == "UPDATE_FAILED"


def test_a_base_that_is_gone(tuned, ann):
    one = tuned(base="gone")
    with pytest.raises(openai.NotFoundError, match="adapter of 'gone', which does not exist"):
        chat(ann, one.name)
    assert ann.models.retrieve(one.name).status == "UPDATE_FAILED"
    assert ann.models.delete(one.name).deleted


def test_a_fallback_steps_in_for_one_that_is_damaged(gateway, tuned, ann):
    bad = tuned()
    chat(ann, bad.name)
    gateway.services.storage.put(f"adapters/{bad.id}/adapter_config.json", b"x")
    for engines in gateway.engines["fake"]:
        run(gateway, engines.forget([bad.id]))
    name = f"safe-{time.monotonic_ns()}"
    gateway.services.store.registered.add(
        ModelRecord(f"mdl_{name}", "ann", name, model=bad.name, fallback="fake"), 100
    )
    run(gateway, gateway.refresh())
    assert chat(ann, name).model == "fake"


# -- many at once


def test_more_adapters_than_slots_take_turns(gateway, tuned, keys):
    several = [tuned() for _ in range(6)]
    names = [one.name for one in several] + ["fake"]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=keys["ann"], max_retries=0
        ) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=name, messages=QUESTION, max_tokens=2)
                    for name in names * 10
                )
            )
        return [answer.model for answer in answers]

    assert asyncio.run(ask_all()) == names * 10
    assert all(len(each) <= 2 for each in loaded(gateway))


def test_who_hangs_up_while_waiting_for_a_turn_leaves_the_line(tmp_path):
    slow = fake_endpoint("slow", max_adapters=1, vllm_args={"token_delay_s": 0.05})
    with GatewayThread([slow], api_keys=[ROOT]) as gateway:
        services, names = gateway.services, ("ft:first", "ft:second")
        for name in names:
            served(services.store, services.storage, tmp_path / name, name=name, base="slow")
        with openai_of(gateway, ROOT) as client, httpx.Client(timeout=0.3) as http:
            first = chat(client, names[0], stream=True, max_tokens=40)
            next(first)
            body = {"model": names[1], "messages": QUESTION}
            with pytest.raises(httpx.ReadTimeout):
                http.post(
                    f"{gateway.url}/v1/chat/completions", json=body,
                    headers={"authorization": f"Bearer {ROOT}"},
                )  # fmt: skip
            eventually(lambda: gateway.load("slow").waiting == 0, 2)
            assert gateway.load("slow").running == 1
            assert len(list(first)) == 39
            assert chat(client, names[1])


def run(gateway: GatewayThread, work):
    return asyncio.run_coroutine_threadsafe(work, gateway.loop).result(10)
