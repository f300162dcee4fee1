"""`serve deploy` against a running cluster of two nodes."""

import pytest

from tests.support.cluster import eventually
from tests.support.nodes import Nodes

pytestmark = pytest.mark.slow

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
        assert client.get("/v1/models/org/added:1").status_code == 404


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


def test_without_keys_it_does_not_serve_beyond_loopback(tmp_path):
    bare = Nodes(tmp_path, count=1)
    del bare.environment["LLM_ENGINE_API_KEYS"]  # the nodes', not that of whoever deploys
    with bare:
        bare.deploy(settings(bare, TWO))

        def failed() -> bool:
            return bare.applications()["llm-engine"]["status"] == "DEPLOY_FAILED"

        eventually(failed, 60, 0.5)
        assert "there is no API key" in bare.applications()["llm-engine"]["message"]
