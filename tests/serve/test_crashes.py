"""Whatever is killed in the middle of a create or an update: a true status, no endpoint lost."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster import START_TIMEOUT_S, Cluster, command, eventually, free_port
from tests.support.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SLOW = {"model": "none", "engine": "fake", "num_cpus": 0.1, "vllm_args": {"load_delay_s": 4.0}}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as running:
        yield running


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> dict[str, Any]:
    folder = Path(tmp_path_factory.getbasetemp())
    return {
        "gateway": {"port": free_port(), "api_keys": [Cluster.KEY], "min_replicas": 2},
        "endpoints": [{"name": "declared", **SLOW, "vllm_args": {}}],
        "cluster": {"state_dir": str(folder / "crash"), "ray_port": 0,
                    "dashboard_port": free_port()},
        "store": {"url": postgres.new_database()},
        "responses": {"lease_s": 3},
    }  # fmt: skip


@pytest.fixture(scope="module")
def cluster(settings: dict[str, Any]) -> Iterator[Cluster]:
    with Cluster(settings) as running:
        yield running


def post(cluster: Cluster, name: str, **settings: Any) -> None:
    with cluster.client() as client:
        made = client.post("/v1/endpoints", json={"name": name, **SLOW, **settings})
        assert made.status_code == 201, made.text


def patch(cluster: Cluster, name: str, **settings: Any) -> None:
    with cluster.client() as client:
        changed = client.patch(f"/v1/endpoints/{name}", json=settings)
        assert changed.status_code == 200, changed.text


def delete(cluster: Cluster, name: str) -> None:
    with cluster.client() as client:
        client.delete(f"/v1/endpoints/{name}").raise_for_status()
        eventually(lambda: client.get(f"/v1/endpoints/{name}").status_code == 404, 60, 0.2)


def answers(cluster: Cluster, model: str) -> int:
    with cluster.client() as client:
        body = {"model": model, "prompt": "One", "max_tokens": 3}
        return client.post("/v1/completions", json=body).status_code


@pytest.mark.parametrize(
    ("deployment", "delay_s"),
    [("Controller", 0.0), ("Controller", 1.5), ("ModelRouter", 1.5), ("Ingress", 0.0)],
)
def test_a_part_that_dies_in_a_create_and_in_an_update(
    cluster: Cluster, deployment: str, delay_s: float
):
    name = f"{deployment.lower()}-{delay_s}"
    most = cluster.endpoint("declared")["spec"]["max_queue"] + 1
    post(cluster, name)
    patch(cluster, "declared", max_queue=most)
    time.sleep(delay_s)
    kill(cluster, deployment)
    cluster.wait_until(name, "READY", 60)
    assert cluster.wait_until("declared", "READY", 60)["spec"]["max_queue"] == most
    for each in (name, "declared"):
        # A gateway that has not heard from the router yet knows it from the store alone.
        eventually(lambda each=each: cluster.endpoint(each)["replicas_ready"] == 1, 30, 0.2)
        assert answers(cluster, each) == 200
    delete(cluster, name)


def kill(cluster: Cluster, deployment: str) -> None:
    killed = cluster.replica_pids(deployment)[0]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in cluster.replica_pids(deployment), 30)


def test_an_engine_that_dies_while_it_loads_is_started_again(cluster: Cluster):
    post(cluster, "engine")
    loading = eventually(lambda: engines(cluster, "engine"), 30, 0.1)
    os.kill(loading[0], signal.SIGKILL)
    eventually(lambda: "SIGKILL" in str(cluster.endpoint("engine")["last_error"]), 30, 0.1)
    row = cluster.wait_until("engine", "READY", 90)
    assert "SIGKILL" in row["last_error"]

    patch(cluster, "engine", max_queue=9)
    old = engines(cluster, "engine")
    fresh = eventually(lambda: set(engines(cluster, "engine")) - set(old), 30, 0.1)
    os.kill(fresh.pop(), signal.SIGKILL)
    assert answers(cluster, "engine") == 200, "the earlier version no longer serves"
    assert cluster.wait_until("engine", "READY", 90)["spec"]["max_queue"] == 9
    delete(cluster, "engine")


def engines(cluster: Cluster, endpoint: str) -> list[int]:
    """The engine processes below an endpoint's replicas."""
    title = f"ray::ServeReplica:llm-engine.{endpoint}:"
    replicas = [p for p in cluster.processes() if " ".join(command(p)).startswith(title)]
    children = [child for replica in replicas for child in replica.children()]
    return [c.pid for c in children if "llm_engine.engine.fake" in " ".join(command(c))]


def respond(cluster: Cluster, model: str, count: int, **asked: Any) -> list[str]:
    """The ids of so many responses in the background."""
    ids = []
    with cluster.client() as client:
        for seed in range(count):
            body = {"model": model, "input": "One", "background": True, "seed": seed} | asked
            made = client.post("/v1/responses", json=body)
            assert made.status_code == 200, made.text
            ids.append(made.json()["id"])
    return ids


def responses_of(cluster: Cluster, ids: list[str]) -> dict[str, dict[str, Any]]:
    with cluster.client() as client:
        return {each: client.get(f"/v1/responses/{each}").json() for each in ids}


def all_ended(cluster: Cluster, ids: list[str], timeout_s: float) -> dict[str, dict[str, Any]]:
    left = list(ids)

    def ended() -> bool:
        for each, row in responses_of(cluster, left[:50]).items():
            if row["status"] not in ("queued", "in_progress"):
                left.remove(each)
        return not left

    eventually(ended, timeout_s, 0.1, "some never end")
    return responses_of(cluster, ids)


def test_responses_outlive_the_gateway_that_works_on_them(cluster: Cluster):
    post(cluster, "talks", vllm_args={"token_delay_s": 0.1})
    cluster.wait_until("talks", "READY", 60)
    ids = respond(cluster, "talks", 100, max_output_tokens=30)
    with cluster.openai() as client:
        stream = client.responses.create(
            model="talks", input="One", background=True, stream=True, max_output_tokens=60
        )
        told = [next(iter(stream)) for _ in range(8)]
        killed = kill_all(cluster, "Ingress")
        name = told[0].response.id
        ends = all_ended(cluster, [*ids, name], 60)
        rest = list(client.responses.retrieve(name, stream=True, starting_after=7))
    assert killed == 2
    for number, each in enumerate(ids):
        assert ends[each]["status"] == "completed", ends[each]
        assert ends[each]["output"][0]["content"][0]["text"].startswith(f"{number} word")
    # It had been told in part: another answer would not go on from that.
    assert ends[name]["status"] == "failed" and "lost" in ends[name]["error"]["message"]
    assert [event.sequence_number for event in rest] == list(range(8, 8 + len(rest)))
    assert rest[-1].type == "response.failed"
    delete(cluster, "talks")


def kill_all(cluster: Cluster, deployment: str) -> int:
    killed = cluster.replica_pids(deployment)
    for each in killed:
        os.kill(each, signal.SIGKILL)
    eventually(lambda: len(set(cluster.replica_pids(deployment)) - set(killed)) == 2, 60)
    with cluster.client() as client:

        def back() -> bool:
            try:
                return client.get("/health").is_success
            except httpx.HTTPError:
                return False

        eventually(back, 60, 0.2)
    return len(killed)


def test_while_the_store_is_away_models_answer_and_no_key_is_refused(
    cluster: Cluster, postgres: Postgres
):
    with cluster.client() as admin:
        key = admin.post("/v1/keys", json={"owner": "ann"}).json()["key"]
        revoked = admin.post("/v1/keys", json={"owner": "ann"}).json()
        admin.delete(f"/v1/keys/{revoked['id']}").raise_for_status()
    body = {"model": "declared", "prompt": "One", "max_tokens": 3}

    def ask(given: str) -> int:
        with cluster.client(headers={"Authorization": f"Bearer {given}"}) as client:
            return client.post("/v1/completions", json=body).status_code

    eventually(lambda: [ask(revoked["key"]) for _ in range(8)] == [401] * 8, 10)
    postgres.stop()
    try:
        assert [ask(key) for _ in range(8)] == [200] * 8
        assert ask(Cluster.KEY) == 200
        assert ask("sk-le-nobody-knows-this") == 503, "who can't look must not say 401"
        assert ask(revoked["key"]) == 401
        with cluster.client() as admin:
            refused = admin.post("/v1/endpoints", json={"name": "now", **SLOW})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"
        # Even a controller and a router that start without the store keep what runs running.
        for deployment in ("Controller", "ModelRouter"):
            kill(cluster, deployment)
        time.sleep(5)
        assert [ask(key) for _ in range(8)] == [200] * 8
    finally:
        postgres.start()
    eventually(lambda: ask("sk-le-nobody-knows-this") == 401, 20, 0.5)
    cluster.wait_until("declared", "READY", 60)
    post(cluster, "now")
    cluster.wait_until("now", "READY", 60)
    delete(cluster, "now")


def test_a_rolling_update_under_load_fails_no_request(cluster: Cluster):
    """5,000 and more, while the endpoint changes again and again."""
    failures: list[Any] = []
    done = [0]
    stop = threading.Event()

    def keep_asking() -> None:
        with cluster.client() as client:
            body = {"model": "declared", "prompt": "One", "max_tokens": 3}
            while not stop.is_set():
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    failures.append(error)
                    continue
                done[0] += 1
                if answer.status_code != 200:
                    failures.append(answer.text)

    threads = [threading.Thread(target=keep_asking) for _ in range(8)]
    for thread in threads:
        thread.start()
    round_ = 0
    while done[0] < 5000:
        round_ += 1
        patch(cluster, "declared", max_queue=100 + round_)
        cluster.wait_until("declared", "READY", 60)
    stop.set()
    for thread in threads:
        thread.join()
    assert round_ >= 2 and failures == []


def lose_ray(cluster: Cluster) -> None:
    """While the gateway is being put on it: `up` begins once more."""
    eventually(lambda: {"event": "step", "name": "Ray"} in cluster.events, 10)
    eventually(lambda: any(each.get("name") == "gateway" for each in cluster.events), 90)
    (head,) = [p for p in cluster.processes() if {"start", "--head"} <= set(command(p))]
    head.kill()
    cluster.wait_for("again", 60)


def test_after_the_power_went_every_endpoint_is_back(cluster: Cluster, settings: dict[str, Any]):
    """In the middle of a create, of an update and of a delete; and with responses that wait. And
    though Ray is lost once more when it is started."""
    for name in ("kept", "updating", "leaving"):
        post(cluster, name, vllm_args={})
    for name in ("kept", "updating", "leaving"):
        cluster.wait_until(name, "READY", 90)
    post(cluster, "creating", vllm_args={"load_delay_s": 15.0})
    eventually(lambda: [answers(cluster, "creating") for _ in range(8)] == [503] * 8, 10)
    waiting = respond(cluster, "creating", 1000, max_output_tokens=1)
    patch(cluster, "updating", max_queue=9)
    with cluster.client() as client:
        client.delete("/v1/endpoints/leaving").raise_for_status()
    cluster.kill()
    with Cluster(settings, wait=False) as again:
        lose_ray(again)
        again.wait_for("settled", START_TIMEOUT_S)
        for name in ("kept", "creating", "updating", "declared"):
            again.wait_until(name, "READY", 120)
            eventually(lambda name=name: answers(again, name) == 200, 10)
        assert again.endpoint("updating")["spec"]["max_queue"] == 9
        ends = all_ended(again, waiting, 120)
        assert {row["status"] for row in ends.values()} == {"completed"}
        with again.client() as client:
            eventually(lambda: client.get("/v1/endpoints/leaving").status_code == 404, 60, 0.2)
