"""What the running system promises beyond answers: sockets, disconnects, deaths, the end."""

import ipaddress
import json
import os
import signal
import socket
import threading

import httpx
import psutil
import pytest

from tests.support.cluster import Cluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LONG = {
    "model": "demo-chat",
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 1900,
    "ignore_eos": True,
    "stream": True,
}


def test_every_port_is_on_loopback(cluster: Cluster):
    listening = {
        (connection.laddr.ip, connection.laddr.port, process.name())
        for process in cluster.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 10, "this looks at the wrong processes"
    assert {row for row in listening if not is_loopback(row[0])} == set()


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def test_rays_dashboard_asks_for_a_token(cluster: Cluster):
    port = cluster.settings.cluster.dashboard_port
    answer = httpx.get(f"http://127.0.0.1:{port}/api/serve/applications/", trust_env=False)
    assert answer.status_code in (401, 403)


def test_a_client_that_leaves_stops_the_generation_within_a_second(cluster: Cluster):
    body = json.dumps(LONG).encode()
    connection = socket.create_connection(("127.0.0.1", cluster.settings.gateway.port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {cluster.KEY}"
        f"\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    assert b"200 OK" in connection.recv(4096)
    eventually(lambda: cluster.load("demo-chat") == 1, 15)
    connection.close()
    # The router hears of it with the replica's next report, half a second later at the latest.
    eventually(lambda: cluster.load("demo-chat") == 0, 1.6, 0.05, "still generating")


def test_requests_are_spread_over_replicas(cluster: Cluster):
    before = {r["replica"]: r["load"]["generated_tokens"] for r in replicas(cluster)}
    client = cluster.openai()

    def one() -> None:
        client.completions.create(model="demo-chat", prompt="One", max_tokens=100)

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def worked() -> int:
        after = {r["replica"]: r["load"]["generated_tokens"] for r in replicas(cluster)}
        return sum(after[name] > before.get(name, 0) for name in after)

    eventually(lambda: worked() == 2, 15)


def replicas(cluster: Cluster) -> list[dict]:
    return [r for r in cluster.endpoint("demo-chat")["replicas"] if r["state"] == "READY"]


def test_metrics_sum_over_ingress_replicas(cluster: Cluster):
    name = 'llm_engine_requests_total{model="demo-embed",path="/v1/embeddings",status="200"}'

    def count() -> float:
        with cluster.client() as client:
            lines = client.get("/metrics").raise_for_status().text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    cluster.openai().chat.completions.create(
        model="demo-chat", messages=LONG["messages"], stream=True, max_tokens=3
    ).close()
    before = count()
    for _ in range(6):
        with cluster.client() as client:  # a connection of its own: another ingress may answer
            body = {"model": "demo-embed", "input": "hello"}
            assert client.post("/v1/embeddings", json=body).status_code == 200
    # The other ingress replica's counts travel with its next call to the router.
    eventually(lambda: count() == before + 6, 15, what="requests were counted twice or not at all")
    with cluster.client() as client:
        text = client.get("/metrics").text
    for metric in ("llm_engine_generated_tokens_total", "llm_engine_queue_waiting",
                   "llm_engine_time_to_first_token_seconds_bucket"):  # fmt: skip
        assert f"{metric}{{" in text


def test_health_needs_no_key(cluster: Cluster):
    answer = httpx.get(f"{cluster.url}/health", trust_env=False)
    assert answer.json() == {"status": "healthy", "agents": 1}


def test_a_killed_engine_costs_no_request_and_is_replaced(cluster: Cluster):
    engines = cluster.engines("demo-chat")
    assert len(engines) == 2
    cores = engines[0].children(recursive=True)
    statuses: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        body = {"model": "demo-chat", "prompt": "One", "max_tokens": 30}
        with cluster.client() as client:
            while not stop.is_set():
                statuses.append(client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(statuses) > 10)
    os.kill(engines[0].pid, signal.SIGKILL)
    eventually(lambda: len(replicas(cluster)) == 1, 10, what="its death was not noticed")
    seen = len(statuses)
    eventually(lambda: len(statuses) > seen + 20)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    eventually(lambda: not [c for c in cores if alive(c)], 5, what=f"left behind: {cores}")
    eventually(lambda: len(replicas(cluster)) == 2, 90, 0.5, "the engine was not replaced")


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_engine_core_that_dies_is_noticed(cluster: Cluster):
    """vLLM's HTTP process survives its engine core for a while; the replica must not."""
    engine = cluster.engines("demo-chat")[0]
    core = next(c for c in engine.children(recursive=True) if "EngineCor" in c.name())
    os.kill(core.pid, signal.SIGKILL)
    eventually(lambda: len(replicas(cluster)) == 1, 15, what="its death was not noticed")
    eventually(lambda: len(replicas(cluster)) == 2, 90, 0.5, "the engine was not replaced")
    client = cluster.openai()
    for _ in range(4):
        client.completions.create(model="demo-chat", prompt="One", max_tokens=3)


@pytest.mark.parametrize("deployment", ["ModelRouter", "Controller"])
def test_requests_go_on_while_a_part_that_they_do_not_need_is_gone(cluster: Cluster, deployment):
    eventually(lambda: len(replicas(cluster)) == 2, 90, 0.5)
    before = {r["replica"] for r in replicas(cluster)}
    [killed] = cluster.replica_pids(deployment)
    os.kill(killed, signal.SIGKILL)
    with cluster.client() as client:
        body = {"model": "demo-chat", "prompt": "One", "max_tokens": 3}
        statuses = [client.post("/v1/completions", json=body).status_code for _ in range(30)]
    assert statuses == [200] * 30
    eventually(lambda: set(cluster.replica_pids(deployment)) - {killed}, 60, 0.5)

    def as_before() -> bool:
        with cluster.client() as client:
            answer = client.get("/v1/endpoints/demo-chat")
        return (
            answer.is_success
            and answer.json()["status"] == "READY"
            and {r["replica"] for r in answer.json()["replicas"]} == before
        )

    eventually(as_before, 60, 0.5, "the engines were restarted, or their state was lost")


def test_a_killed_ingress_replica_is_replaced(cluster: Cluster):
    os.kill(cluster.replica_pids("Ingress")[0], signal.SIGKILL)

    def steady() -> bool:
        try:
            with cluster.client() as client:
                return all(client.get("/v1/models").is_success for _ in range(20))
        except httpx.HTTPError:
            return False

    eventually(steady, 30, 0.2, "requests still reach the dead replica")
