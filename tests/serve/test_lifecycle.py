"""Endpoints made, watched, scaled, changed and deleted at run time, on real Ray and real vLLM."""

import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def api(cluster: Cluster) -> Iterator[httpx.Client]:
    with cluster.client(timeout=180) as client:
        yield client


@pytest.fixture
def name(cluster: Cluster, api: httpx.Client) -> Iterator[str]:
    """A name for an endpoint, which is deleted afterwards."""
    chosen = f"made-{uuid.uuid4().hex[:6]}"
    yield chosen
    api.delete(f"/v1/endpoints/{chosen}")
    eventually(lambda: api.get(f"/v1/endpoints/{chosen}").status_code == 404, 60, 0.2)


def create(api: httpx.Client, endpoint: str, **settings: Any) -> httpx.Response:
    fake = {"name": endpoint, "model": "none", "engine": "fake", "num_cpus": 0.1}
    return api.post("/v1/endpoints", json=fake | settings)


def chat(api: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": QUESTION, "max_tokens": 20} | fields
    return api.post("/v1/chat/completions", json=body)


def events(api: httpx.Client, name: str) -> list[str]:
    rows = api.get(f"/v1/endpoints/{name}/events").json()["data"]
    return list(dict.fromkeys(row["type"] for row in rows))


def fall_asleep(cluster: Cluster, name: str) -> None:
    def asleep() -> bool:
        return str(cluster.endpoint(name)["status_reason"]).startswith("asleep")

    eventually(asleep, 60, 0.2, f"{name} does not fall asleep")


def test_a_vllm_endpoint_from_create_to_delete(cluster: Cluster, api: httpx.Client, name: str):
    made = create(api, name, engine="vllm", model="builtin:chat", num_cpus=0.2)
    assert made.status_code == 201 and made.json()["status"] == "UPDATE_PENDING"
    assert made.json()["owned_by"] == "llm-engine"
    assert create(api, name).status_code == 409
    busy = api.patch(f"/v1/endpoints/{name}", json={"max_queue": 9})
    assert busy.status_code == 409 and busy.json()["error"]["code"] == "operation_in_progress"

    row = cluster.wait_until(name, "READY")
    assert row["replicas_ready"] == row["replicas_wanted"] == 1 and row["status_reason"] is None
    phases = row["phases"]
    assert all(phases[f"{phase}_s"] >= 0 for phase in ("queued", "scheduling", "warming"))
    assert phases["loading_s"] > 1, "vLLM does not load in a second"
    assert phases["total_s"] == pytest.approx(sum(phases.values()) - phases["total_s"], abs=0.01)
    assert events(api, name) == ["created", "UPDATE_PENDING", "UPDATE_IN_PROGRESS", "READY"]
    assert "Paris" in chat(api, name).json()["choices"][0]["message"]["content"]

    assert api.delete(f"/v1/endpoints/{name}").json()["status"] == "DELETE_IN_PROGRESS"
    assert api.delete(f"/v1/endpoints/{name}").status_code in (404, 409)
    eventually(lambda: api.get(f"/v1/endpoints/{name}").status_code == 404, 60, 0.2)
    eventually(lambda: chat(api, name).status_code == 404, 15)
    assert api.delete(f"/v1/endpoints/{name}").status_code == 404


def test_the_next_start_has_an_eta_learned_from_the_last(
    cluster: Cluster, api: httpx.Client, name: str
):
    slow = {"vllm_args": {"load_delay_s": 3.0}, "env": {"SOME": "value"}}
    create(api, name, **slow)
    took = cluster.wait_until(name, "READY")["phases"]
    assert took["loading_s"] > 3
    api.patch(f"/v1/endpoints/{name}", json={"max_queue": 9})
    etas: list[float] = []

    def ready() -> bool:
        row = cluster.endpoint(name)
        etas.extend([row["eta_s"]] if row["eta_s"] is not None else [])
        return row["status"] == "READY" and row["settled"]

    eventually(ready, 60, 0.2)
    assert etas and max(etas) <= took["total_s"] and sorted(etas, reverse=True) == etas
    assert cluster.endpoint(name)["spec"]["env"] == {"SOME": "**********"}


def test_scaling_restarts_nothing(cluster: Cluster, api: httpx.Client, name: str):
    create(api, name)
    before = {r["replica"] for r in cluster.wait_until(name, "READY")["replicas"]}
    api.patch(f"/v1/endpoints/{name}", json={"autoscaling": {"min_replicas": 3, "max_replicas": 3}})
    eventually(lambda: cluster.endpoint(name)["replicas_ready"] == 3, 60, 0.2)
    assert before <= {r["replica"] for r in cluster.endpoint(name)["replicas"]}
    api.patch(f"/v1/endpoints/{name}", json={"autoscaling": {"min_replicas": 1, "max_replicas": 1}})
    eventually(lambda: len(cluster.endpoint(name)["replicas"]) == 1, 60, 0.2)
    assert cluster.endpoint(name)["status"] == "READY"


def test_an_endpoint_sleeps_and_one_replica_wakes_for_everybody(
    cluster: Cluster, api: httpx.Client, name: str
):
    """Two ingress replicas hold forty requests at once; each gets its answer."""
    create(api, name, vllm_args={"load_delay_s": 2.0},
           autoscaling={"min_replicas": 0, "max_replicas": 3, "idle_delay_s": 2})  # fmt: skip
    cluster.wait_until(name, "READY")
    fall_asleep(cluster, name)
    assert cluster.endpoint(name)["status"] == "READY"
    assert name in [m["id"] for m in api.get("/v1/models").json()["data"]]
    assert api.get("/health").json()["status"] == "healthy"

    answers: list[int] = []

    def ask() -> None:
        with cluster.client() as client:  # a connection of its own: any ingress may take it
            answers.append(chat(client, name).status_code)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    seen: set[str] = set()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen |= {r["replica"] for r in cluster.endpoint(name)["replicas"]}
        time.sleep(0.2)
    assert answers == [200] * 40
    assert len(seen) == 1, "it woke more than once"


def test_a_request_that_waits_too_long_for_a_waking_endpoint_is_told_to_come_back(
    cluster: Cluster, api: httpx.Client, name: str
):
    scaling = {"min_replicas": 0, "idle_delay_s": 1, "wake_timeout_s": 2}
    create(api, name, vllm_args={"load_delay_s": 6.0}, autoscaling=scaling)
    cluster.wait_until(name, "READY")
    fall_asleep(cluster, name)
    answer = chat(api, name)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert "wake_timeout_s" in answer.json()["error"]["message"]
    eventually(lambda: chat(api, name).status_code == 200, 60, 0.2)


def test_asking_for_what_the_cluster_has_not_got_fails_with_numbers(
    cluster: Cluster, api: httpx.Client, name: str
):
    create(api, name, num_gpus=4)
    row = cluster.wait_until(name, "UPDATE_FAILED", 30)
    assert row["status_reason"] == "needs 4 GPUs, the cluster has 0"
    refused = chat(api, name)
    assert refused.status_code == 503 and "needs 4 GPUs" in refused.json()["error"]["message"]


def test_a_checkpoint_that_cannot_be_loaded_fails_with_the_engines_own_words(
    cluster: Cluster, api: httpx.Client, name: str, tmp_path
):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "x"}')
    create(api, name, engine="vllm", model=str(tmp_path))
    row = cluster.wait_until(name, "UPDATE_FAILED")
    assert "NoSuchModel" in row["status_reason"] or "model type" in row["status_reason"]
    assert row["last_error"] == row["status_reason"]


def test_an_update_that_fails_leaves_the_old_version_serving_and_can_be_put_right(
    cluster: Cluster, api: httpx.Client, name: str
):
    create(api, name)
    cluster.wait_until(name, "READY")
    assert api.patch(f"/v1/endpoints/{name}", json={"vllm_args": {"no": 1}}).status_code == 200
    row = cluster.wait_until(name, "UPDATE_FAILED")
    assert row["status_reason"].startswith("the update failed, an earlier version serves on: ")
    assert chat(api, name).status_code == 200
    api.patch(f"/v1/endpoints/{name}", json={"vllm_args": None})
    cluster.wait_until(name, "READY")


def test_a_declared_endpoint_is_deleted_where_it_is_declared(api: httpx.Client):
    refused = api.delete("/v1/endpoints/demo-chat")
    assert refused.status_code == 409 and "configuration" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": "a/../b"}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": None}, "model"),
        ({"vllm_args": {"port": 1}}, "vllm_args"),
    ],
)
def test_bad_settings_are_refused_by_name(api: httpx.Client, name: str, changes, param):
    refused = create(api, name, **changes)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


def test_owners_see_their_own_and_what_is_public(cluster: Cluster, api: httpx.Client, name: str):
    def key(owner: str, *scopes: str) -> dict[str, str]:
        made = api.post("/v1/keys", json={"owner": owner, "scopes": list(scopes)})
        return {"Authorization": f"Bearer {made.json()['key']}"}

    ann, bob = key("ann", "endpoints", "inference"), key("bob", "endpoints", "inference")
    settings = {"name": name, "model": "none", "engine": "fake", "public": False, "num_cpus": 0.1}
    assert api.post("/v1/endpoints", json=settings, headers=ann).status_code == 201
    assert api.get(f"/v1/endpoints/{name}", headers=bob).status_code == 404
    assert api.patch(f"/v1/endpoints/{name}", json={}, headers=bob).status_code == 404
    assert api.delete(f"/v1/endpoints/{name}", headers=bob).status_code == 404
    cluster.wait_until(name, "READY")
    body = {"model": name, "messages": QUESTION}
    assert api.post("/v1/chat/completions", json=body, headers=ann).status_code == 200
    assert api.post("/v1/chat/completions", json=body, headers=bob).status_code == 404
    seen = [m["id"] for m in api.get("/v1/models", headers=bob).json()["data"]]
    assert name not in seen and "demo-chat" in seen

    eventually(lambda: api.patch(f"/v1/endpoints/{name}", json={"public": True}).is_success)
    eventually(
        lambda: api.post("/v1/chat/completions", json=body, headers=bob).status_code == 200, 10
    )
    row = api.get(f"/v1/endpoints/{name}", headers=bob).json()
    assert row["status"] == "READY" and row["spec"] is None and row["replicas"] == []
    assert api.delete(f"/v1/endpoints/{name}", headers=bob).status_code == 403


def test_a_delete_lets_running_answers_end(cluster: Cluster, api: httpx.Client, name: str):
    create(api, name, vllm_args={"token_delay_s": 0.05})
    cluster.wait_until(name, "READY")
    told: list[bytes] = []

    def stream() -> None:
        body = {"model": name, "prompt": "Go on", "max_tokens": 100, "stream": True}
        with cluster.client() as client:
            told.append(client.post("/v1/completions", json=body).content)

    streams = [threading.Thread(target=stream) for _ in range(3)]
    for each in streams:
        each.start()
    eventually(lambda: cluster.load(name) == 3, 10)
    assert api.delete(f"/v1/endpoints/{name}").is_success
    for each in streams:
        each.join()
    assert [content.count(b"data: ") for content in told] == [101] * 3
    assert all(content.endswith(b"data: [DONE]\n\n") for content in told)
