"""What the gateway promises of every request, over real sockets in front of fake engines."""

import json
import os
import signal
import socket
import time

import httpx
import psutil
import pytest

from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint


def chat(**changes):
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return body | changes


def test_answers_a_chat(gateway):
    with gateway.client() as client:
        answer = client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "word " * 4
    assert answer.headers["x-request-id"].startswith("req_")


def test_streams_events_as_they_come():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 0.1})
    with GatewayThread([slow]) as gateway, gateway.client() as client:
        arrivals = []
        with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            for _ in answer.iter_raw():
                arrivals.append(time.monotonic())
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert arrivals[-1] - arrivals[0] > 0.2, "the events came all at once"


def test_every_answer_carries_the_callers_request_id(gateway):
    with gateway.client(headers={"x-request-id": "mine"}) as client:
        for answer in (
            client.post("/v1/chat/completions", json=chat()),
            client.post("/v1/chat/completions", json={}),
            client.get("/v1/models"),
            client.get("/nowhere"),
        ):
            assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/images/generations", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none/such:one", 404, "model_not_found"),
        ("GET", "/v1/endpoints/none", 404, "endpoint_not_found"),
    ],
)
def test_errors_are_openai_error_objects(gateway, method, path, status, code):
    with gateway.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, None, None),
        (b"\xff\xfe", 400, None, None),
        (b"[]", 400, "invalid_type", None),
        (json.dumps(chat(model="none")).encode(), 404, "model_not_found", "model"),
        (json.dumps(chat(model="vectors")).encode(), 400, "model_not_supported", "model"),
        (json.dumps(chat(messages=[])).encode(), 400, None, "messages"),
        (json.dumps(chat(max_tokens=-1)).encode(), 400, None, "max_tokens"),
    ],
)
def test_bad_requests_name_what_is_wrong(gateway, body, status, code, param):
    with gateway.client() as client:
        answer = client.post("/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/keys", {"owner": "a", "name": "x\0y"}, "name"),
        ("/v1/keys", {"owner": "a", "expires_at": "inf"}, "expires_at"),
        ("/v1/endpoints", {"name": "e", "model": "m", "num_cpus": "inf"}, "num_cpus"),
        (
            "/v1/endpoints",
            {"name": "e", "model": "m", "autoscaling": {"idle_delay_s": "nan"}},
            "autoscaling.idle_delay_s",
        ),
    ],
)
def test_what_postgresql_cannot_keep_is_refused_by_name(gateway, path, body, param):
    with gateway.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_model_rows(gateway):
    with gateway.client() as client:
        rows = client.get("/v1/models").json()
        row = client.get("/v1/models/fake").json()
    assert rows["object"] == "list" and [r["id"] for r in rows["data"]] == ["fake", "vectors"]
    assert row["object"] == "model" and row["max_model_len"] == 8192


def test_model_ids_with_slashes_and_colons():
    name = "org/model:tag"
    with GatewayThread([fake_endpoint(name)]) as gateway, gateway.client() as client:
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert client.post("/v1/chat/completions", json=chat(model=name)).status_code == 200


def test_health_needs_no_key_and_all_else_does():
    with GatewayThread([fake_endpoint("fake")], api_keys=["sk-one"]) as gateway:
        with gateway.client() as client:
            assert client.get("/health").json() == {"status": "healthy", "agents": 1}
            for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic sk-one"}):
                for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
                    answer = client.get(path, headers=headers)
                    assert answer.status_code == 401, path
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            headers = {"authorization": "Bearer sk-one"}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.options("/v1/models").status_code == 200


def test_bodies_over_the_limit_get_413_whether_announced_or_not():
    with GatewayThread([fake_endpoint("fake")], max_body_bytes=2048) as gateway:
        with gateway.client() as client:
            big = json.dumps(chat(user="x" * 4096)).encode()
            announced = client.post("/v1/chat/completions", content=big)
            chunked = client.post("/v1/chat/completions", content=iter([big[:3000], big[3000:]]))
            fine = client.post("/v1/chat/completions", json=chat())
    for answer in (announced, chunked):
        assert answer.status_code == 413 and "2048" in answer.json()["error"]["message"]
    assert fine.status_code == 200


def test_embeddings(gateway):
    with gateway.client() as client:
        answer = client.post("/v1/embeddings", json={"model": "vectors", "input": ["a", "b"]})
    assert [row["embedding"] for row in answer.json()["data"]] == [[1.0, 0.0], [1.0, 0.0]]


def test_a_client_that_leaves_mid_stream_stops_the_engine():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 0.05})
    with GatewayThread([slow]) as gateway:
        connection = open_stream(gateway, chat(stream=True, max_tokens=10_000))
        assert connection.recv(4096)
        assert gateway.load("fake").running == 1
        connection.close()
        eventually(lambda: gateway.load("fake").depth == 0, 15, 0.05, "still generating")


def test_a_client_that_leaves_before_the_first_byte_stops_the_engine():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 0.5})
    with GatewayThread([slow]) as gateway:
        connection = open_stream(gateway, chat(max_tokens=10_000))
        eventually(lambda: gateway.load("fake").running == 1, 15, 0.02)
        connection.close()
        eventually(lambda: gateway.load("fake").depth == 0, 15, 0.05, "still generating")


def open_stream(gateway, body) -> socket.socket:
    content = json.dumps(body).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_what_ends_early_leaves_no_connection_open():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 0.05})
    with GatewayThread([slow]) as gateway, gateway.client() as client:

        def leave(times: int) -> None:
            for _ in range(times):
                streams = [open_stream(gateway, chat(stream=True, max_tokens=999)) for _ in "ab"]
                streams[0].recv(4096)
                for stream in streams:
                    stream.close()
                assert client.post("/v1/chat/completions", json={}).status_code == 400
            eventually(lambda: gateway.load("fake").depth == 0, 15, 0.05, "still generating")

        leave(1)
        before = psutil.Process().num_fds()
        leave(20)
        eventually(lambda: psutil.Process().num_fds() <= before + 4, 15, 0.1, "they stay open")


def test_a_full_queue_is_429_with_retry_after():
    full = fake_endpoint("fake", max_queue=1, vllm_args={"token_delay_s": 0.05})
    with GatewayThread([full], retry_after_s=7) as gateway:
        first = open_stream(gateway, chat(stream=True, max_tokens=10_000))
        first.recv(4096)
        with gateway.client() as client:
            answer = client.post("/v1/chat/completions", json=chat())
        first.close()
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_dead_replica_is_replaced_unseen_before_the_first_byte():
    with GatewayThread([fake_endpoint("fake")], replicas=2) as gateway, gateway.client() as client:
        client.post("/v1/chat/completions", json=chat())  # a kept connection to be stale later
        os.kill(gateway.engines["fake"][0].pid, signal.SIGKILL)
        statuses = [client.post("/v1/chat/completions", json=chat()).status_code for _ in range(20)]
    assert statuses == [200] * 20


def test_no_replica_left_is_503_with_retry_after():
    with GatewayThread([fake_endpoint("fake")]) as gateway, gateway.client() as client:
        os.kill(gateway.engines["fake"][0].pid, signal.SIGKILL)
        answer = client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "model_not_ready"


def test_a_replica_lost_mid_stream_ends_the_stream_with_an_error_event():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 0.05})
    with GatewayThread([slow]) as gateway, gateway.client() as client:
        body = chat(stream=True, max_tokens=10_000)
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            received = b""
            for piece in answer.iter_raw():
                if not received:
                    os.kill(gateway.engines["fake"][0].pid, signal.SIGKILL)
                received += piece
    last = received.strip().split(b"\n\n")[-1]
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "stream_interrupted"
    assert b"[DONE]" not in received


def test_an_engine_that_stays_silent_is_given_up():
    slow = fake_endpoint("fake", vllm_args={"token_delay_s": 5})
    with GatewayThread([slow], request_timeout_s=1) as gateway, gateway.client() as client:
        began = time.monotonic()
        answer = client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 504 and "request_timeout_s" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 4.5, "it was waited for longer"


def test_metrics_count_requests_and_tokens_by_model(gateway):
    with gateway.client() as client:
        client.post("/v1/chat/completions", json=chat(stream=True))
        text = client.get("/metrics").text
    assert (
        'llm_engine_requests_total{model="fake",path="/v1/chat/completions",status="200"}' in text
    )
    assert 'llm_engine_time_to_first_token_seconds_count{model="fake"}' in text
    assert 'llm_engine_inter_token_latency_seconds_count{model="fake"}' in text


def test_the_engines_port_is_closed_to_those_without_the_secret(gateway):
    replica = gateway.services.balancer.table.replicas["fake"][0]
    for path in ("/health", "/v1/models", "/metrics", "/-/load"):
        answer = httpx.get(f"http://{replica.host}:{replica.port}{path}", trust_env=False)
        assert answer.status_code == 403, path


def test_many_concurrent_streams_all_end_well(gateway):
    from concurrent.futures import ThreadPoolExecutor

    with gateway.client(limits=httpx.Limits(max_connections=64)) as client:

        def one(_: int) -> bytes:
            answer = client.post("/v1/chat/completions", json=chat(stream=True, max_tokens=50))
            return answer.content

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(one, range(128)))
    assert all(a.count(b"data: {") == 50 and a.endswith(b"data: [DONE]\n\n") for a in answers)
