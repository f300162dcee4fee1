"""Adapters on the whole system with real vLLM: loaded, mixed, damaged, deleted, outlived."""

import asyncio
import time

import httpx
import openai
import pytest

from benchmarks import lora
from llm_engine.endpoints import OPERATOR
from llm_engine.fine_tunes.adapters import publish
from llm_engine.records import AdapterRecord
from llm_engine.storage.opening import open_storage
from llm_engine.store.sql import Store
from tests.support.adapters import adapter, record
from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PLAIN = "The capital of France is Paris."
TOKENS = 16


class Tuner:
    """Makes adapters as fine-tunes do, less the training."""

    def __init__(self, cluster: Cluster, folder) -> None:
        self._folder = folder
        self.store = Store(cluster.settings.store_url)
        self.storage = open_storage(cluster.settings)
        self._count = 0

    def make(self, **values) -> AdapterRecord:
        self._count += 1
        made = adapter(
            f"ft:demo-chat:{time.time_ns()}::{self._count}",
            **{"owner": OPERATOR, "base": "demo-chat", "weights": lora.WEIGHTS} | values,
        )
        folder = lora.make(self._folder / made.id, seed=self._count, rank=made.rank)
        publish(self.storage, folder, made)
        return made

    def serve(self, **values) -> AdapterRecord:
        made = self.make(**values)
        record(self.store, made)
        return made


@pytest.fixture(scope="module")
def tuner(cluster, tmp_path_factory):
    tuner = Tuner(cluster, tmp_path_factory.mktemp("adapters"))
    yield tuner
    tuner.store.close()


def ask(client: openai.OpenAI, model: str = "demo-chat", **changes) -> str:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, **{"max_tokens": TOKENS} | changes
    )
    assert answer.model == model
    return answer.choices[0].message.content


def in_memory(cluster: Cluster) -> list[set[str]]:
    """By replica, as they report it."""
    replicas = cluster.endpoint("demo-chat")["replicas"]
    return [set(r["load"]["adapters"]) for r in replicas if r["state"] == "READY"]


def test_a_new_adapter_answers_at_once_and_the_base_as_before(cluster, tuner):
    client = cluster.openai()
    one = tuner.make()
    assert ask(client) == PLAIN
    with pytest.raises(openai.NotFoundError):
        ask(client, one.name)
    record(tuner.store, one)
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model=one.name, messages=QUESTION, temperature=0, max_tokens=TOKENS, stream=True
    )
    first = next(stream)
    assert time.perf_counter() - began < 3
    assert {first.model} | {chunk.model for chunk in stream} == {one.name}
    answer = ask(client, one.name)
    assert answer != PLAIN and ask(client) == PLAIN
    assert ask(client, one.name) == answer
    text = client.completions.create(model=one.name, prompt="One", max_tokens=3)
    assert text.model == one.name
    assert eventually(lambda: any(one.id in held for held in in_memory(cluster)), 10)
    row = client.models.retrieve(one.name)
    assert row.parent == "demo-chat" and row.status == "READY"


def test_more_adapters_than_slots_and_the_base_mixed_in_the_same_steps(cluster, tuner):
    """Each answer is what its model gives alone: none is computed with another's weights."""
    several = [tuner.serve() for _ in range(10)]
    client = cluster.openai()
    alone = {one.name: ask(client, one.name) for one in several} | {"demo-chat": PLAIN}
    assert len(set(alone.values())) > 8
    names = [name for one in several for name in (one.name, "demo-chat")] * 4

    async def ask_all() -> list[str]:
        async with cluster.async_openai() as everybody:
            answers = await asyncio.gather(
                *(
                    everybody.chat.completions.create(
                        model=name, messages=QUESTION, temperature=0, max_tokens=TOKENS
                    )
                    for name in names
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    for name, answer in zip(names, asyncio.run(ask_all()), strict=True):
        assert answer == alone[name], name
    assert all(len(held) <= 4 for held in in_memory(cluster))


def test_a_damaged_adapter_fails_clearly_and_no_engine_with_it(cluster, tuner):
    client, good = cluster.openai(), tuner.serve()
    engines = {process.pid for process in cluster.engines("demo-chat")}
    cut, strange, large = tuner.make(), tuner.make(), tuner.make()
    key = f"adapters/{cut.id}/adapter_model.safetensors"
    tuner.storage.put(key, b"".join(tuner.storage.read(key))[:-100])
    # What vLLM itself refuses: no safetensors, and a rank that its record does not tell.
    folder = lora.make(tuner._folder / "strange", seed=1)
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    publish(tuner.storage, folder, strange)
    publish(tuner.storage, lora.make(tuner._folder / "large", seed=1, rank=64), large)
    for bad in (cut, strange, large):
        record(tuner.store, bad)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as failed:
                ask(client, bad.name)
            assert failed.value.code == "adapter_broken" and bad.name in failed.value.message
    assert ask(client) == PLAIN and ask(client, good.name) != PLAIN
    assert {process.pid for process in cluster.engines("demo-chat")} == engines


def test_deleted_while_it_answers_and_gone_everywhere(cluster, tuner):
    client, one = cluster.openai(), tuner.serve()
    stream = client.chat.completions.create(
        model=one.name, messages=QUESTION, max_tokens=400, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = [next(stream)]
    assert client.models.delete(one.name).deleted
    # Whichever gateway is asked: each on a connection of its own.
    for _ in range(12):
        with cluster.client() as http, pytest.raises(httpx.HTTPStatusError) as refused:
            body = {"model": one.name, "messages": QUESTION}
            http.post("/v1/chat/completions", json=body).raise_for_status()
        assert refused.value.response.status_code == 404
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length", "what runs comes to its end"
    assert eventually(lambda: not any(one.id in held for held in in_memory(cluster)), 15)
    cached = cluster.settings.cache_dir / "adapters"
    assert eventually(lambda: not (cached / one.id).exists(), 10)
    assert ask(client) == PLAIN


def test_a_new_engine_loads_what_its_predecessor_had(cluster, tuner):
    client, one = cluster.openai(), tuner.serve()
    answer = ask(client, one.name)
    for process in cluster.engines("demo-chat"):
        process.kill()

    def answers() -> bool:
        try:
            return ask(client, one.name) == answer
        except openai.APIStatusError:
            return False

    assert eventually(answers, 240, 1)
    assert ask(client) == PLAIN
