"""Scale's real client, `llmengine`, against the running system on vLLM."""

import asyncio
from typing import Any

import pytest

from tests.api.test_llm_engine_dialect import import_client, use
from tests.support.cluster import Cluster, eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore:BasicAuth is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'auth' parameter is deprecated:DeprecationWarning"),
]


@pytest.fixture
def scale(cluster: Cluster) -> Any:
    client = import_client()
    use(client, cluster, cluster.KEY)
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


def test_a_model_from_create_to_delete(cluster: Cluster, scale: Any):
    model, name = scale.Model, "scale-made"
    made = model.create(
        name=name,
        model="builtin:chat",
        inference_framework_image_tag="latest",
        cpus="200m",
        min_workers=1,
        max_workers=1,
        labels={"team": "search", "product": "answers"},
    )
    assert made.endpoint_creation_task_id
    with pytest.raises(scale.errors.BadRequestError, match="already exists"):
        model.create(name=name, model="builtin:chat", inference_framework_image_tag="latest")
    assert model.get(name).status.value in ("UPDATE_PENDING", "UPDATE_IN_PROGRESS")
    ready(scale, name)
    told = model.get(name)
    assert told.spec.deployment_state.available_workers == 1
    assert told.spec.labels == {"team": "search", "product": "answers"}
    assert told.inference_framework_tag == "latest"
    assert {"demo-chat", "demo-embed", name} <= {m.name for m in model.list().model_endpoints}

    answer = scale.Completion.create(model=name, prompt="Hello", max_new_tokens=5, temperature=0.0)
    assert answer.output.text and answer.output.num_completion_tokens == 5

    before = {r["replica"] for r in cluster.endpoint(name)["replicas"]}
    model.update(name, per_worker=7)  # every other field is null: unchanged
    eventually(lambda: model.get(name).spec.deployment_state.per_worker == 7, 10)
    told = model.get(name)
    assert told.spec.labels == {"team": "search", "product": "answers"}
    assert {r["replica"] for r in cluster.endpoint(name)["replicas"]} == before

    model.update(name, max_model_len=1024)
    ready(scale, name)
    eventually(lambda: cluster.endpoint(name)["max_model_len"] == 1024, 60)
    assert model.delete(name).deleted
    eventually(lambda: is_gone(scale, name), 60, 0.3)


def test_a_model_that_cannot_start_says_why(scale: Any):
    name = "scale-broken"
    scale.Model.create(
        name=name, model="broken", checkpoint_path="/nowhere/at/all",
        inference_framework_image_tag="latest", min_workers=1, max_workers=1, cpus="200m",
    )  # fmt: skip
    eventually(lambda: scale.Model.get(name).status.value == "UPDATE_FAILED", 60, 0.3)
    with pytest.raises(scale.errors.ServerError, match="no folder"):
        scale.Completion.create(model=name, prompt="Hello")
    scale.Model.delete(name)
    eventually(lambda: is_gone(scale, name), 60, 0.3)


def ready(scale: Any, name: str) -> None:
    eventually(lambda: scale.Model.get(name).status.value == "READY", 120, 0.3)


def is_gone(scale: Any, name: str) -> bool:
    try:
        scale.Model.get(name)
    except scale.errors.NotFoundError:
        return True
    return False


def test_tokens_are_counted_and_told(scale: Any):
    ask = scale.Completion.create
    asked = {"model": "demo-chat", "prompt": "The capital of France is", "temperature": 0.0}
    told = ask(**asked, max_new_tokens=8, return_token_log_probs=True).output
    assert told.num_completion_tokens == len(told.tokens) == 8
    assert all(token.log_prob <= 0 for token in told.tokens)
    rows = [
        event.output
        for event in ask(**asked, max_new_tokens=8, return_token_log_probs=True, stream=True)
    ]
    assert "".join(row.text for row in rows) == told.text
    assert [row.token.token for row in rows if row.token] == [t.token for t in told.tokens]
    assert rows[-1].finished and not any(row.finished for row in rows[:-1])
    assert rows[-1].num_completion_tokens == 8
    assert rows[-1].num_prompt_tokens == told.num_prompt_tokens > 1


def test_guided_answers_and_stop_sequences(scale: Any):
    ask = scale.Completion.create
    asked = {"model": "demo-chat", "prompt": "The capital of France is", "temperature": 0.0}
    asked |= {"max_new_tokens": 8}
    assert ask(**asked, guided_choice=["zebra", "yak"]).output.text in ("zebra", "yak")
    assert ask(**asked, guided_regex="[0-9]{3}").output.text.isdigit()
    text = ask(**asked).output.text
    stopped = ask(**asked, stop_sequences=[text[3:6]]).output.text
    assert stopped == text[: text.index(text[3:6])]


def test_what_the_engine_refuses_is_a_bad_request(scale: Any):
    ask, errors = scale.Completion.create, scale.errors
    with pytest.raises(errors.BadRequestError, match=r"max_new_tokens|context"):
        ask(model="demo-chat", prompt="Hello", max_new_tokens=10**6)
    with pytest.raises(errors.BadRequestError):
        next(ask(model="demo-chat", prompt="Hello", guided_grammar="root ::= (", stream=True))


async def test_the_asynchronous_client(scale: Any):
    create = scale.Completion.acreate
    asked = {"model": "demo-chat", "prompt": "Hello", "temperature": 0.0, "max_new_tokens": 6}
    whole, streamed = await asyncio.gather(create(**asked), create(**asked, stream=True))
    rows = [event.output async for event in streamed]
    assert "".join(row.text for row in rows) == whole.output.text
