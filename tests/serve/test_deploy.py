"""`serve deploy` against a running cluster of two nodes."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from tests.support.cluster import eventually
from tests.support.nodes import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CHAT = {"name": "demo-chat", "model": "builtin:chat"}
TWO = {"name": "two", "model": "none", "engine": "fake", "num_cpus": 1,
       "autoscaling": {"min_replicas": 2, "max_replicas": 2}}  # fmt: skip
ADDED = {"name": "org/added:1", "model": "none", "engine": "fake"}
BROKEN = {"name": "broken", "model": "/nowhere/at/all"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with Nodes(tmp_path_factory.mktemp("nodes")) as running:
        yield running


def settings(nodes: Nodes, *endpoints: dict) -> dict:
    return {"gateway": {"host": "0.0.0.0", "port": nodes.port}, "endpoints": list(endpoints)}


def replicas(nodes: Nodes) -> dict[str, set[str]]:
    """Every replica in the cluster, the gateway's own too, by deployment."""
    return {
        f"{app}/{deployment}": {replica["replica_id"] for replica in state["replicas"]}
        for app, content in nodes.applications().items()
        for deployment, state in content["deployments"].items()
    }


def test_deploy_add_and_remove_models(nodes: Nodes):
    nodes.deploy(settings(nodes, CHAT, TWO))
    rows = nodes.wait_ready("demo-chat", "two")
    hosts = {replica["host"] for row in rows.values() for replica in row["replicas"]}
    assert hosts == {"127.0.0.2", "127.0.0.3"}, "the replicas do not cross nodes"
    with nodes.client() as client:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        for model in ("demo-chat", "two", "two", "two", "two"):
            body = {"model": model, "messages": question, "max_tokens": 20}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
    before = replicas(nodes)

    nodes.deploy(settings(nodes, CHAT, TWO, ADDED))
    nodes.wait_ready("demo-chat", "two", "org/added:1")
    after = replicas(nodes)
    assert {name: after[name] for name in before} == before, "adding a model restarted others"

    nodes.deploy(settings(nodes, CHAT, TWO))
    eventually(lambda: replicas(nodes) == before, 60, 0.5, "the removed model is still there")
    with nodes.client() as client:
        eventually(lambda: client.get("/v1/models/org/added:1").status_code == 404, 60)


def test_an_update_fails_no_request_and_cuts_no_stream(nodes: Nodes):
    before = {**ADDED, "name": "changing", "vllm_args": {"token_delay_s": 0.02}}
    after = {**before, "vllm_args": {"token_delay_s": 0.02, "max_model_len": 999}}
    nodes.deploy(settings(nodes, before))
    old = nodes.wait_ready("changing")["changing"]["replicas"][0]["replica"]
    statuses: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with nodes.client() as client:
            while not stop.is_set():
                answer = client.post("/v1/chat/completions", json=chat("changing", 5))
                statuses.append(answer.status_code)

    def one_long_stream() -> bytes:
        with nodes.client() as client:
            body = chat("changing", 600) | {"stream": True}
            return client.post("/v1/chat/completions", json=body, timeout=60).content

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(3)]
        stream = pool.submit(one_long_stream)
        eventually(lambda: len(statuses) > 10)
        nodes.deploy(settings(nodes, after))

        def replaced() -> bool:
            row = nodes.endpoints().get("changing", {})
            return row.get("max_model_len") == 999 and old not in str(row["replicas"])

        eventually(replaced, 90, 0.5, "the old replica is still there")
        stop.set()
        assert stream.result().endswith(b"data: [DONE]\n\n"), "a stream was cut by the update"
        for each in asking:
            each.result()
    assert set(statuses) == {200}


def test_an_update_that_fails_leaves_the_old_version_serving(nodes: Nodes):
    good = {**ADDED, "name": "steady"}
    nodes.deploy(settings(nodes, good))
    nodes.wait_ready("steady")
    nodes.deploy(settings(nodes, {**good, "vllm_args": {"nonsense": 1}}))

    def told() -> bool:
        row = nodes.endpoints().get("steady", {})
        return "the update failed" in (row.get("status_reason") or "")

    eventually(told, 90, 0.5, f"not told: {nodes.endpoints().get('steady')}")
    row = nodes.endpoints()["steady"]
    assert row["status"] == "UPDATE_FAILED" and row["replicas_ready"] == 1
    assert "has no nonsense" in row["status_reason"]
    with nodes.client() as client:
        assert client.post("/v1/chat/completions", json=chat("steady", 3)).is_success


def test_replicas_follow_the_queue_up_and_down(nodes: Nodes):
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_queue_depth": 2,
               "upscale_delay_s": 1, "downscale_delay_s": 2}  # fmt: skip
    busy = {**ADDED, "name": "busy", "num_cpus": 0.2, "autoscaling": scaling,
            "vllm_args": {"token_delay_s": 0.05}}  # fmt: skip
    nodes.deploy(settings(nodes, busy))
    nodes.wait_ready("busy")

    def stream() -> bytes:
        with nodes.client() as client:
            body = chat("busy", 300) | {"stream": True}
            return client.post("/v1/chat/completions", json=body, timeout=120).content

    def ready() -> int:
        return nodes.endpoints().get("busy", {}).get("replicas_ready", 0)

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream) for _ in range(6)]
        eventually(lambda: ready() == 3, 60, 0.5, "it did not scale up")
        assert all(s.result().endswith(b"data: [DONE]\n\n") for s in streams)
    eventually(lambda: ready() == 1, 60, 0.5, "it did not scale down")


def chat(model: str, tokens: int) -> dict:
    message = {"role": "user", "content": "hi"}
    return {"model": model, "messages": [message], "max_tokens": tokens}


def test_a_model_that_cannot_start_says_why_and_harms_nobody(nodes: Nodes):
    nodes.deploy(settings(nodes, TWO, BROKEN))

    def failed() -> bool:
        return nodes.endpoints().get("broken", {}).get("status") == "UPDATE_FAILED"

    eventually(failed, 60, 0.5)
    reason = nodes.endpoints()["broken"]["status_reason"]
    assert reason.startswith("there is no folder /nowhere/at/all."), reason
    with nodes.client() as client:
        body = {"model": "broken", "messages": [{"role": "user", "content": "hi"}]}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503 and "/nowhere/at/all" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        assert client.post("/v1/chat/completions", json=body | {"model": "two"}).is_success


def test_too_few_gpus_is_said(nodes: Nodes):
    nodes.deploy(settings(nodes, TWO, {**CHAT, "num_gpus": 4}))

    def reason() -> str:
        return nodes.endpoints().get("demo-chat", {}).get("status_reason") or ""

    eventually(lambda: "needs 4 GPUs, the cluster has 0" in reason(), 30, 0.5)


def test_deploying_the_gateway_anew_leaves_alone_what_clients_have_made(nodes: Nodes):
    nodes.deploy(settings(nodes, TWO))
    nodes.wait_ready("two")
    with nodes.client() as client:
        new = {**ADDED, "name": "made", "num_cpus": 0.2, "vllm_args": {"token_delay_s": 0.05}}
        assert client.post("/v1/endpoints", json=new).status_code == 201
        nodes.wait_ready("two", "made")
        before = replicas(nodes)
        response = begin_response(client, "made", tokens=600)
        changed = settings(nodes, TWO)
        changed["gateway"]["retry_after_s"] = 7  # another gateway: every part of it restarts
        nodes.deploy(changed)

        def restarted() -> bool:
            now = replicas(nodes)
            fresh = now.get("llm-engine/Controller", set())
            return bool(fresh) and not fresh & before["llm-engine/Controller"]

        eventually(restarted, 60, 0.5, "the gateway was not deployed anew")
        nodes.wait_ready("two", "made")
        after = replicas(nodes)
        for application in ("llm-engine.two", "llm-engine.made"):
            name = f"{application}/EngineReplica"
            assert after[name] == before[name], "its engines were restarted"
        # Half of it was told: nobody but the gateway that is being replaced can end it.
        path = f"/v1/responses/{response}"
        eventually(lambda: client.get(path).json()["status"] != "in_progress", 60, 0.5)
        assert client.get(path).json()["status"] == "completed"
        eventually(lambda: client.delete("/v1/endpoints/made").is_success, 20, 0.5)
    nodes.wait_ready("two")


def begin_response(client: httpx.Client, model: str, tokens: int) -> str:
    """In the background, with events; once there are some words."""
    body = {"model": model, "input": "hi", "background": True, "stream": True,
            "max_output_tokens": tokens}  # fmt: skip
    with client.stream("POST", "/v1/responses", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        first = json.loads(next(lines).removeprefix("data: "))
        for line in lines:
            if "output_text.delta" in line:
                break
    return first["response"]["id"]


def test_serve_run_starts_the_same_configuration_and_without_keys_only_on_loopback(tmp_path):
    """The commands that the README gives for a Ray that runs."""
    alone = Nodes(tmp_path, count=1)
    del alone.environment["LLM_ENGINE_API_KEYS"]  # the nodes', not that of whoever deploys
    with alone:
        file = tmp_path / "llm-engine.yaml"
        content = settings(alone, ADDED)
        content["gateway"]["host"] = "127.0.0.1"
        file.write_text(yaml.safe_dump(content))
        alone.environment["RAY_ADDRESS"] = alone.gcs
        alone.url = f"http://127.0.0.1:{alone.port}"
        place = ("--http-host", "127.0.0.1", "--http-port", str(alone.port))
        alone.serve("start", *place)
        application = ("deployments.app:build", f"config={file}")
        alone.serve("run", "--non-blocking", "--name", "llm-engine", *application)
        alone.wait_ready("org/added:1")
        with alone.client() as client:
            assert client.post("/v1/chat/completions", json=chat("org/added:1", 3)).is_success

        alone.deploy(settings(alone, ADDED))  # on all addresses

        def failed() -> bool:
            return alone.applications()["llm-engine"]["status"] == "DEPLOY_FAILED"

        eventually(failed, 60, 0.5)
        assert "there is no API key" in alone.applications()["llm-engine"]["message"]
