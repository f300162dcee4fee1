"""Scale's real client, `llmengine`, against a gateway in front of fake engine processes."""

import asyncio
import base64
import os
import signal

import pytest

from llm_engine.api.auth import make_key
from llm_engine.config import EndpointSettings
from llm_engine.records import ModelRecord, Scope
from llm_engine.statuses import EndpointState
from tests.support.gateway import GatewayThread, fake_endpoint

#: The client's way of sending Basic authorization, where it is asynchronous.
pytestmark = [
    pytest.mark.filterwarnings("ignore:BasicAuth is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'auth' parameter is deprecated:DeprecationWarning"),
]

ROOT = "sk-operator"
PATH = "/llm-engine/v1/llm"
SYNC, STREAM = f"{PATH}/completions-sync", f"{PATH}/completions-stream"
ENDPOINTS = f"{PATH}/model-endpoints"


@pytest.fixture(scope="module")
def served():
    endpoints = [
        fake_endpoint("fake"),
        fake_endpoint("org/fake:1"),
        fake_endpoint("vectors", task="embed"),
    ]
    with GatewayThread(endpoints, api_keys=[ROOT]) as running:
        yield running


@pytest.fixture
def scale(served):
    """The client, at the gateway, with the operator's key."""
    client = import_client()
    use(client, served)
    yield client
    client.api_engine.set_base_path(None)
    client.api_engine.set_api_key(None)


def import_client():
    os.environ["LLM_ENGINE_DISABLE_VERSION_CHECK"] = "1"  # it would ask the package index
    try:
        import llmengine
    finally:
        del os.environ["LLM_ENGINE_DISABLE_VERSION_CHECK"]
    return llmengine


def use(client, gateway, key=ROOT):
    client.api_engine.set_base_path(gateway.url + "/llm-engine/")
    client.api_engine.set_api_key(key)


def key_of(gateway, owner, *scopes) -> str:
    record, key = make_key(owner, "test", scopes or (Scope.INFERENCE, Scope.ENDPOINTS), None)
    gateway.services.store.keys.add(record, 1000)
    return key


def create(client, name, **fields):
    return client.Model.create(
        name=name, model="builtin:chat", inference_framework_image_tag="latest", **fields
    )


def settle(gateway, name, state=EndpointState.READY, reason=None):
    """What the controller does once the endpoint has answered."""
    store = gateway.services.store.endpoints
    assert store.observe(store.get(name), state, reason, True, None)


def http(gateway, **options):
    headers = {"authorization": f"Bearer {ROOT}"}
    return gateway.client(**{"headers": headers, **options})


# -- completions


def test_a_completion(scale):
    answer = scale.Completion.create(model="fake", prompt="hi", max_new_tokens=3)
    assert answer.output.text == "word word word "
    assert answer.output.num_completion_tokens == 3 and answer.output.num_prompt_tokens == 1
    assert answer.output.tokens is None and len(answer.request_id) == 36


def test_a_completion_with_every_field(scale):
    answer = scale.Completion.create(
        model="fake", prompt="hi", max_new_tokens=2, temperature=0.5, stop_sequences=["x"],
        return_token_log_probs=True, presence_penalty=0.5, frequency_penalty=0.5, top_k=5,
        top_p=0.9, include_stop_str_in_output=True, guided_choice=["word"],
        skip_special_tokens=False,
    )  # fmt: skip
    assert answer.output.num_completion_tokens == 2


def test_a_stream(scale):
    events = list(scale.Completion.create(model="fake", prompt="hi", max_new_tokens=4, stream=True))
    assert len({event.request_id for event in events}) == 1
    rows = [event.output for event in events]
    assert "".join(row.text for row in rows) == "word " * 4
    assert [row.finished for row in rows] == [False, False, False, True]
    assert [row.num_completion_tokens for row in rows] == [1, 2, 3, 4]
    assert all(row.token is None for row in rows)
    assert all(event.error is None for event in events)


async def test_asynchronous_completions_and_streams(scale):
    answer = await scale.Completion.acreate(model="fake", prompt="hi", max_new_tokens=2)
    assert answer.output.text == "word word "
    stream = await scale.Completion.acreate(
        model="fake", prompt="hi", max_new_tokens=3, stream=True
    )
    rows = [event.output async for event in stream]
    assert "".join(row.text for row in rows) == "word " * 3
    assert [row.finished for row in rows] == [False, False, True]


def test_names_with_slashes_work_in_queries_and_paths(scale, served):
    name = "org/fake:1"
    assert scale.Completion.create(model=name, prompt="hi").output.text
    assert list(scale.Completion.create(model=name, prompt="hi", stream=True))
    create(scale, name)
    assert scale.Model.get(name).name == name
    settle(served, name)
    scale.Model.update(name, per_worker=5)
    assert scale.Model.get(name).spec.deployment_state.per_worker == 5
    assert scale.Model.delete(name).deleted


def test_the_word_done_is_never_sent(served):
    with http(served) as client:
        answer = client.post(f"{STREAM}?model_endpoint_name=fake", json={"prompt": "hi"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b"[DONE]" not in answer.content
    assert answer.content.count(b"data: {") == 20 and answer.content.endswith(b"}\n\n")


def test_completions_raise_what_the_client_documents(scale):
    from llmengine import errors

    ask = scale.Completion.create
    with pytest.raises(errors.NotFoundError, match=r"^The specified endpoint could not be found"):
        ask(model="none", prompt="hi")
    with pytest.raises(errors.NotFoundError, match=r"^Model endpoint none not found\.$"):
        next(ask(model="none", prompt="hi", stream=True))
    for fields in (
        {"max_new_tokens": 0}, {"prompt": ""}, {"top_k": 0}, {"temperature": 0.0, "top_k": 5},
        {"temperature": 0.0, "top_p": 0.5}, {"guided_regex": "a", "guided_choice": ["a"]},
        {"model": "vectors"}, {"model": ""},
    ):  # fmt: skip
        with pytest.raises(errors.BadRequestError):
            ask(**{"model": "fake", "prompt": "hi", **fields})
        with pytest.raises(errors.BadRequestError):
            next(ask(**{"model": "fake", "prompt": "hi", "stream": True, **fields}))
    scale.api_engine.set_api_key("sk-wrong")
    with pytest.raises(errors.UnauthorizedError):
        ask(model="fake", prompt="hi")


def test_a_full_queue_and_a_dead_engine_keep_their_statuses(scale):
    from llmengine import errors

    full = fake_endpoint("full", max_queue=1, vllm_args={"token_delay_s": 0.05})
    with GatewayThread([full], retry_after_s=7) as gateway:
        use(scale, gateway)
        first = scale.Completion.create(
            model="full", prompt="hi", max_new_tokens=10_000, stream=True
        )
        next(first)
        with pytest.raises(errors.RateLimitExceededError, match="full"):
            scale.Completion.create(model="full", prompt="hi")
        os.kill(gateway.engines["full"][0].pid, signal.SIGKILL)
        *_, last = first
        assert last.output is None and last.error.status_code == 500
        assert "incomplete" in last.error.content.error
        with pytest.raises(errors.ServerError, match="503"):
            scale.Completion.create(model="full", prompt="hi")


def test_a_registered_models_limit_is_told_in_this_apis_words(served):
    short = ModelRecord("mdl-1", "llm-engine", "short", "fake", max_output_token_count=5)
    served.services.store.registered.add(short, 100)
    asyncio.run_coroutine_threadsafe(served.refresh(), served.loop).result(10)
    with http(served) as client:
        address = f"{SYNC}?model_endpoint_name=short"
        fine = client.post(address, json={"prompt": "hi", "max_new_tokens": 5})
        more = client.post(address, json={"prompt": "hi", "max_new_tokens": 6})
    assert fine.status_code == 200 and more.status_code == 400
    assert "'max_new_tokens' is 6" in more.json()["detail"]


# -- keys


def test_the_same_key_comes_in_by_every_door(served):
    key = key_of(served, "doors")
    basic = base64.b64encode(f"{key}:".encode()).decode()
    with served.client() as client:
        create_one = {"name": "door", "model_name": "builtin:chat", "public_inference": False}
        bearer = {"authorization": f"Bearer {key}"}
        assert client.post(ENDPOINTS, json=create_one, headers=bearer).status_code == 200
        for headers in (
            bearer,
            {"x-api-key": key},
            {"authorization": f"Basic {basic}"},
            {"authorization": f"Basic {basic}", "x-api-key": key},
        ):
            shown = client.get(f"{ENDPOINTS}/door", headers=headers)
            assert shown.status_code == 200 and shown.json()["spec"]["created_by"] == "doors"
        nobody = client.get(ENDPOINTS)
    assert nobody.status_code == 401 and isinstance(nobody.json()["detail"], str)


def test_an_endpoint_belongs_to_who_made_it(scale, served):
    from llmengine import errors

    ours, theirs = key_of(served, "us"), key_of(served, "them")
    use(scale, served, ours)
    create(scale, "secret", public_inference=False)
    create(scale, "shared")
    use(scale, served, theirs)
    names = [model.name for model in scale.Model.list().model_endpoints]
    assert "shared" in names and "secret" not in names
    assert scale.Model.get("shared").spec.created_by == "us"
    with pytest.raises(errors.NotFoundError, match="Model Endpoint secret  was not found"):
        scale.Model.get("secret")
    for name in ("secret", "shared"):  # an update hides that there is one at all
        with pytest.raises(errors.NotFoundError, match="specified LLM endpoint"):
            scale.Model.update(name, max_workers=2)
    with pytest.raises(errors.NotFoundError, match="requested model endpoint"):
        scale.Model.delete("secret")
    with http(served, headers={"x-api-key": theirs}) as client:
        assert client.delete(f"{ENDPOINTS}/shared").status_code == 403
    use(scale, served, ours)
    assert {"secret", "shared"} <= {model.name for model in scale.Model.list().model_endpoints}


def test_a_key_without_the_scope_may_look_and_not_touch(served):
    key = key_of(served, "reader", Scope.INFERENCE)
    lame = key_of(served, "lame", Scope.ENDPOINTS)
    new = {"name": "touched", "model_name": "builtin:chat"}
    with http(served, headers={"x-api-key": key}) as client:
        assert client.get(ENDPOINTS).status_code == 200
        for answer in (
            client.post(ENDPOINTS, json=new),
            client.put(f"{ENDPOINTS}/any", json={}),
            client.delete(f"{ENDPOINTS}/any"),
        ):
            assert answer.status_code == 403 and "endpoints" in answer.json()["detail"]
        answer = client.post(
            f"{SYNC}?model_endpoint_name=fake", json={"prompt": "hi"}, headers={"x-api-key": lame}
        )
        assert answer.status_code == 403 and "inference" in answer.json()["detail"]


# -- endpoints


def test_a_models_life(scale, served):
    from llmengine import errors

    made = create(
        scale, "life", checkpoint_path="/weights", cpus=4, memory="24Gi", storage="40Gi",
        gpus=2, num_shards=2, gpu_type="nvidia-hopper-h100", min_workers=1, max_workers=3,
        per_worker=10, quantize="awq", labels={"team": "a"}, public_inference=False,
        max_model_len=2048, billing_tags={"x": 1}, chat_template_override="{{ x }}",
    )  # fmt: skip
    assert made.endpoint_creation_task_id
    shown = scale.Model.get("life")
    assert (shown.status, shown.name, shown.model_name) == (
        "UPDATE_PENDING", "life", "builtin:chat",
    )  # fmt: skip
    assert (shown.inference_framework, shown.inference_framework_tag) == ("vllm", "latest")
    assert (shown.num_shards, shown.quantize, shown.source) == (2, "awq", "hugging_face")
    assert shown.chat_template_override == "{{ x }}"
    spec = shown.spec
    assert spec.labels == {"team": "a"} and spec.public_inference is False
    assert spec.created_at and spec.last_updated_at and spec.created_by == "llm-engine"
    workers, resources = spec.deployment_state, spec.resource_state
    assert (workers.min_workers, workers.max_workers, workers.per_worker) == (1, 3, 10)
    assert (workers.available_workers, workers.unavailable_workers) == (0, 0)
    assert (resources.gpus, resources.gpu_type) == (2, "nvidia-hopper-h100")
    assert (float(resources.cpus), resources.memory, resources.storage) == (4, "24Gi", "40Gi")

    with pytest.raises(errors.UnknownError, match=r"^Existing operation on endpoint in progress"):
        scale.Model.update("life", max_workers=4)
    settle(served, "life")
    assert scale.Model.get("life").status == "READY"
    assert scale.Model.update("life", max_workers=4).endpoint_creation_task_id
    after = scale.Model.get("life")
    assert after.spec.deployment_state.max_workers == 4
    assert after.status == "READY", "the engines did not change"

    changed = {"max_workers", "last_updated_at"}
    before, now = flat(shown.dict()), flat(after.dict())
    assert {key for key in before if before[key] != now[key]} <= changed | {"status"}

    scale.Model.update("life", max_model_len=1024)
    assert scale.Model.get("life").status == "UPDATE_PENDING"
    assert scale.Model.delete("life").deleted
    assert scale.Model.get("life").status == "DELETE_IN_PROGRESS"
    with pytest.raises(errors.UnknownError, match="Existing operation"):
        scale.Model.delete("life")
    store = served.services.store.endpoints
    store.remove(store.get("life"))
    with pytest.raises(errors.NotFoundError, match="Model Endpoint life  was not found"):
        scale.Model.get("life")


def flat(data):
    """{"a": {"b": 1}} as {"b": 1}: names do not repeat but for the status."""
    found = {}
    for key, value in data.items():
        found |= flat(value) if isinstance(value, dict) else {key: value}
    return found


def test_the_raw_row_has_what_the_client_drops(served):
    with http(served) as client:
        body = {"name": "raw", "model_name": "label", "checkpoint_path": "org/model",
                "inference_framework_image_tag": "0.9.4", "metadata": {"a": [1]},
                "billing_tags": {"b": 2}}  # fmt: skip
        assert client.post(ENDPOINTS, json=body).status_code == 200
        settle(served, "raw", EndpointState.UPDATE_FAILED, "no GPU: " + "x" * 1000)
        row = client.get(f"{ENDPOINTS}/raw").json()
        ours = client.get("/v1/endpoints/raw").json()
    assert row["inference_framework_tag"] == row["inference_framework_image_tag"] == "0.9.4"
    assert (row["model_name"], row["checkpoint_path"]) == ("label", "org/model")
    assert row["status"] == row["spec"]["status"] == "UPDATE_FAILED"
    assert row["spec"]["status_reason"].startswith("no GPU") and len(
        row["spec"]["status_reason"]
    ) == 500  # fmt: skip
    assert (row["spec"]["metadata"], row["spec"]["billing_tags"]) == ({"a": [1]}, {"b": 2})
    assert ours["model"] == "org/model", "both dialects see one endpoint"


def test_the_client_can_read_whatever_endpoint_there_is(scale, served):
    store = served.services.store.endpoints
    odd = [
        fake_endpoint("odd-fake"),
        fake_endpoint("odd-vectors", task="embed"),
        EndpointSettings(name="odd-half", model="a/b", num_gpus=0.5, num_cpus=0.25,
                         vllm_args={"quantization": "fp8", "chat_template": "x.jinja"},
                         autoscaling={"target_queue_depth": 0.2}),
    ]  # fmt: skip
    for endpoint in odd:
        store.create(endpoint, "llm-engine", {}, 100)
    store.create(
        fake_endpoint("odd-h200"), "llm-engine", {"scale": {"gpu_type": "nvidia-h200"}}, 100
    )
    models = {model.name: model for model in scale.Model.list().model_endpoints}
    assert {"odd-fake", "odd-vectors", "odd-half", "odd-h200"} <= models.keys()
    assert models["odd-h200"].spec.resource_state.gpu_type is None
    assert models["odd-half"].quantize is None
    assert models["odd-half"].spec.resource_state.gpus == 1
    assert models["odd-half"].spec.deployment_state.per_worker == 1
    assert models["odd-fake"].model_name == "none"


def test_workers_and_state_are_the_live_ones_once_it_has_settled(scale, served):
    served.services.store.endpoints.create(fake_endpoint("fake"), "llm-engine", {}, 100)
    assert scale.Model.get("fake").status == "UPDATE_PENDING", "the last look was before it"
    settle(served, "fake", EndpointState.UPDATE_FAILED)
    assert scale.Model.get("fake").status == "READY"


def test_lists_are_filtered_and_ordered(served):
    with http(served) as client:
        for name in ("order-b", "order-a"):
            client.post(ENDPOINTS, json={"name": name, "model_name": "builtin:chat"})

        def names(**params):
            rows = client.get(ENDPOINTS, params=params).json()["model_endpoints"]
            return [row["name"] for row in rows if row["name"].startswith("order-")]

        assert names() == names(order_by="oldest") == ["order-b", "order-a"]
        assert names(order_by="newest") == names(order_by="alphabetical") == ["order-a", "order-b"]
        assert names(name="order-a") == ["order-a"] and names(name="none") == []
        wrong = client.get(ENDPOINTS, params={"order_by": "size"})
    assert wrong.status_code == 400 and "order_by" in wrong.json()["detail"]


def test_bad_creations_are_bad_requests(scale):
    from llmengine import errors

    create(scale, "taken")
    with pytest.raises(errors.BadRequestError, match=r"^The specified model endpoint already ex"):
        create(scale, "taken")
    for name, fields, word in [
        ("bad", {"min_workers": 2, "max_workers": 1}, "min_workers"),
        ("bad", {"max_workers": 0}, "max_workers"),
        ("bad", {"gpus": 2}, "num shard"),
        ("bad", {"checkpoint_path": "s3://bucket/x"}, "checkpoint_path"),
        ("bad", {"inference_framework": "lightllm"}, "inference_framework"),
        ("bad", {"nodes_per_worker": 2}, "nodes_per_worker"),
        ("bad", {"post_inference_hooks": ["callback"]}, "post_inference_hooks"),
        ("bad", {"swap_space": 4.0}, "swap_space"),
        ("a/../b", {}, "name"),
        ("a\nb", {}, "name"),
        ("a\0", {}, "name"),
        ("", {}, "name"),
    ]:
        with pytest.raises(errors.BadRequestError, match=word):
            create(scale, name, **fields)
    with pytest.raises(errors.NotFoundError):
        scale.Model.get("bad")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"name": "x"}', b'{"name": 1}'])
def test_bodies_that_do_not_fit_are_400_with_a_sentence(served, body):
    with http(served) as client:
        for path in (ENDPOINTS, f"{SYNC}?model_endpoint_name=a", f"{STREAM}?model_endpoint_name=a"):
            answer = client.post(path, content=body)
            assert answer.status_code == 400, (path, answer.text)
            assert isinstance(answer.json()["detail"], str)


def test_a_completion_needs_a_name_and_post(served):
    with http(served) as client:
        nameless = client.post(SYNC, json={"prompt": "hi"})
        got = client.get(SYNC)
    assert nameless.status_code == 400 and "model_endpoint_name" in nameless.json()["detail"]
    assert got.status_code == 405 and isinstance(got.json()["detail"], str)


def test_unknown_paths_are_404_with_a_detail(served):
    with http(served) as client:
        for path in ("/llm-engine/", "/llm-engine/v1/nothing", f"{PATH}/nothing"):
            answer = client.get(path)
            assert answer.status_code == 404 and isinstance(answer.json()["detail"], str)
