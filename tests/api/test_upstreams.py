"""External models and aliases as their callers see them: real sockets, real clients, and an
upstream that does whatever an upstream can do."""

import asyncio
import json
import socket
import time

import openai
import pytest

from llm_engine.api import upstream as upstream_module
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.upstream import (
    EVENTS,
    KEY,
    QUESTION,
    Upstream,
    chat,
    client_of,
    dripping,
    failing,
    gateway_with_registry,
    last_event,
    metric,
    openai_of,
    register,
    saying,
    silent,
    streaming,
)

THEIR_KEY = "sk-theirs-1234567890"


@pytest.fixture(scope="module")
def upstream():
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(upstream):
    with gateway_with_registry([], api_keys=[KEY]) as running:
        register(running, "ext", KEY, url=upstream.url, model="theirs", default_key=THEIR_KEY)
        yield running


@pytest.fixture(scope="module")
def hasty(upstream):
    """A gateway that waits for nobody: only for upstreams that never answer."""
    timeouts = {"request_timeout_s": 0.5, "idle_timeout_s": 0.4}
    with gateway_with_registry([], api_keys=[KEY], **timeouts) as running:
        register(running, "ext", KEY, url=upstream.url, model="theirs")
        yield running


@pytest.fixture(autouse=True)
def fresh(upstream):
    upstream.reset()


# -- what goes there, and what comes back


def test_openai_clients_call_an_external_model_by_its_registered_name(gateway, upstream):
    with openai_of(gateway) as client:
        answer = client.chat.completions.create(model="ext", messages=QUESTION)
        text = client.completions.create(model="ext", prompt="hi")
        vectors = client.embeddings.create(model="ext", input="hi")
    assert answer.choices[0].message.content == "hello" and text.choices[0].text == "hello"
    assert vectors.data[0].embedding == [0.5, 0.25]
    assert {answer.model, text.model, vectors.model} == {"ext"}
    paths = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    assert [asked.path for asked in upstream.asked] == paths
    assert {asked.body["model"] for asked in upstream.asked} == {"theirs"}


def test_the_upstream_gets_its_own_key_and_never_the_callers(gateway, upstream):
    with client_of(gateway) as client:
        client.post("/v1/chat/completions", json={"model": "ext", "messages": QUESTION},
                    headers={"x-api-key": KEY, "cookie": "a=b"})  # fmt: skip
    register(gateway, "keyless", KEY, url=upstream.url)
    chat(gateway, "keyless")
    with_key, without = (asked.headers for asked in upstream.asked)
    assert with_key["authorization"] == f"Bearer {THEIR_KEY}"
    assert "authorization" not in without
    for headers in (with_key, without):
        assert KEY not in json.dumps(headers) and "cookie" not in headers


def test_a_stream_comes_through_in_order_and_under_the_registered_name(gateway, upstream):
    upstream.behave = streaming(*EVENTS, b"[DONE]", pause_s=0.05)
    arrivals, texts, names = [], [], set()
    with openai_of(gateway) as client:
        for chunk in client.chat.completions.create(model="ext", messages=QUESTION, stream=True):
            arrivals.append(time.monotonic())
            texts.append(chunk.choices[0].delta.content)
            names.add(chunk.model)
    assert texts == ["0 ", "1 ", "2 ", "3 ", "4 "] and names == {"ext"}
    assert arrivals[-1] - arrivals[0] > 0.1, "the events came all at once"


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n", b"\n"])
def test_a_stream_may_end_its_lines_as_it_likes_and_need_not_say_done(gateway, upstream, ending):
    between = ending if len(ending) > 1 else b"\n\n"
    parts = [b": a comment" + between, *(b"data:" + event + between for event in EVENTS[:-1])]
    upstream.behave = saying(b"".join(parts) + b"data: " + EVENTS[-1] + ending, "text/event-stream")
    answer = chat(gateway, stream=True)
    assert answer.content.count(b'"content"') == 5 and answer.content.endswith(b"[DONE]\n\n")


def test_the_path_goes_before_the_query_of_the_registered_url(gateway, upstream):
    register(gateway, "query", KEY, url=f"{upstream.url}/?api-version=1")
    assert chat(gateway, "query").status_code == 200
    assert upstream.asked[0].path == "/v1/chat/completions"
    assert upstream.asked[0].query == "api-version=1"


def test_a_connection_is_kept_for_the_next_call(gateway, upstream):
    for stream in (False, True, False):
        assert chat(gateway, stream=stream).status_code == 200
    pool = gateway.services.upstream_pool
    kept = [c for c in pool.connections if upstream.url[7:-3] in str(c)]
    assert len(kept) == 1 and kept[0].is_idle()
    assert metric(gateway, "client_disconnects_total", model="ext") == 0, "ours were taken for it"


def test_tokens_are_counted_as_the_upstream_tells_them(gateway, upstream):
    def counted():
        return [metric(gateway, "upstream_tokens_total", model="ext", kind=kind)
                for kind in ("prompt", "completion")]  # fmt: skip

    before = counted()
    chat(gateway)
    running_totals = [EVENTS[0][:-1] + b',"usage":{"prompt_tokens":7,"completion_tokens":%d}}' % n
                      for n in (1, 2, 3)]  # fmt: skip
    upstream.behave = streaming(*running_totals, b"[DONE]")
    assert chat(gateway, stream=True).status_code == 200
    odd = b'{"choices":[{"message":{"content":""}}],"usage":{"prompt_tokens":"many","x":-1}}'
    upstream.behave = saying(odd)
    assert chat(gateway).status_code == 200
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [14, 5]


# -- its failures


@pytest.mark.parametrize(
    ("behave", "status", "code", "word"),
    [
        (failing(400, {"error": {"message": "bad temperature", "param": "temperature"}}),
         400, None, "bad temperature"),
        (failing(422, {"detail": "no such field"}), 400, None, "no such field"),
        (failing(401), 502, "upstream_failed", "key that was registered"),
        (failing(403), 502, "upstream_failed", "key that was registered"),
        (failing(402, {"error": "no credits"}), 502, "upstream_failed", "no credits"),
        (failing(404), 404, "model_not_found", "does not know"),
        (failing(408), 502, "upstream_failed", "408"),
        (failing(413), 413, "request_too_large", "theirs"),
        (failing(500), 502, "upstream_failed", "500"),
        (failing(503, []), 502, "upstream_unavailable", "no reason given"),
        (failing(204, {}), 502, "upstream_failed", "204"),
        (failing(302, location="http://127.0.0.1:1/"), 502, "upstream_failed", "redirects"),
        (saying(b"<html>"), 502, "upstream_failed", "OpenAI's form"),
        (saying(b"[]"), 502, "upstream_failed", "OpenAI's form"),
        (saying(b"{}"), 502, "upstream_failed", "OpenAI's form"),
        (saying(b'{"choices":[]}'), 502, "upstream_failed", "no answer"),
        (saying(b'{"choices":[{"index":0}]}'), 502, "upstream_failed", "no answer"),
        (saying(b'{"error":{"message":"too much","code":429}}'), 429, None, "too much"),
        (streaming(then="cut"), 502, "upstream_failed", "cannot be reached"),
    ],
)  # fmt: skip
def test_a_failure_of_the_upstream_is_told_as_what_it_is(
    gateway, upstream, behave, status, code, word
):
    upstream.behave = behave
    answer = chat(gateway)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert code is None or error["code"] == code
    assert word in error["message"]
    assert len(upstream.asked) == 1, "it was asked again"


@pytest.mark.parametrize("behave", [silent, dripping(b" ", 0.1, "application/json")])
def test_an_upstream_that_does_not_come_to_an_end_is_504(hasty, upstream, behave):
    upstream.behave = behave
    answer = chat(hasty)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert "0.5 s (gateway.request_timeout_s)" in answer.json()["error"]["message"]
    assert len(upstream.asked) == 1, "it was asked again"


@pytest.mark.parametrize(
    ("behave", "status", "word"),
    [
        (saying(b"<html>", "text/event-stream"), 502, "without an event"),
        (streaming(b"<html>"), 502, "OpenAI's form"),
        (streaming(b'{"choices":1}'), 502, "OpenAI's form"),
        (streaming(b'{ "error": {"message": "bad", "code": 400}}'), 400, "bad"),
        (streaming(b'{"id":"1","error":{"message":"down"},"choices":[]}'), 502, "down"),
        (streaming(then="cut"), 502, "cannot be reached"),
    ],
)
def test_before_the_first_event_a_stream_fails_with_a_status(
    gateway, upstream, behave, status, word
):
    upstream.behave = behave
    answer = chat(gateway, stream=True)
    assert answer.status_code == status and word in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "behave", [streaming(then="silent"), dripping(b": still thinking\n\n", 0.02)]
)
def test_a_stream_without_a_first_event_is_504(hasty, upstream, behave):
    upstream.behave = behave
    answer = chat(hasty, stream=True)
    assert answer.status_code == 504 and "0.5 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("behave", "word"),
    [
        (streaming(EVENTS[0], then="cut"), "broke off"),
        (streaming(EVENTS[0], then="end"), "too early"),
        (streaming(EVENTS[0], b"<html>"), "OpenAI's form"),
        (streaming(EVENTS[0], b'{"error": {"message": "fell over"}}'), "fell over"),
    ],
)
def test_after_the_first_event_a_stream_ends_with_an_error_event(gateway, upstream, behave, word):
    upstream.behave = behave
    answer = chat(gateway, stream=True)
    assert answer.status_code == 200 and answer.content.startswith(b'data: {"')
    assert word in last_event(answer)["error"]["message"]
    assert b"[DONE]" not in answer.content


async def drip_after_an_event(asked, send):
    await streaming(EVENTS[0], then="no")(asked, drop_end(send))
    await dripping(b": hm\n", 0.02)(asked, only_body(send))


@pytest.mark.parametrize("behave", [streaming(EVENTS[0], then="silent"), drip_after_an_event])
def test_a_stream_that_makes_no_further_event_is_ended(hasty, upstream, behave):
    upstream.behave = behave
    began = time.monotonic()
    answer = chat(hasty, stream=True)
    assert "silent" in last_event(answer)["error"]["message"]
    assert time.monotonic() - began > 0.3


def drop_end(send):
    async def sending(message):
        if message["type"] == "http.response.start" or message.get("more_body"):
            await send(message)

    return sending


def only_body(send):
    async def sending(message):
        if message["type"] != "http.response.start":
            await send(message)

    return sending


def test_429_carries_the_upstreams_own_retry_after(gateway, upstream):
    for told, given in (("17", "17"), ("Wed, 21 Oct 2026 07:28:00 GMT", "1"), ("9" * 5000, "1")):
        upstream.behave = failing(429, retry_after=told)
        answer = chat(gateway)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, given)


def test_an_upstream_that_repeats_the_key_is_not_quoted_with_it(gateway, upstream):
    words = {"error": {"message": f"cannot use Bearer {THEIR_KEY} here"}}
    for behave in (failing(400, words), failing(500, words)):
        upstream.behave = behave
        assert "***" in (text := chat(gateway).text) and THEIR_KEY not in text
    upstream.behave = streaming(EVENTS[0], json.dumps(words).encode())
    assert "***" in (text := chat(gateway, stream=True).text) and THEIR_KEY not in text


def test_a_key_that_no_header_can_hold_is_not_quoted_either(gateway, upstream):
    id = register(gateway, "bad-key", KEY, url=upstream.url)
    sealed = gateway.services.safe.seal("sk-bad\r\nx: y")
    gateway.services.store.registered.change(id, sealed_key=sealed)
    asyncio.run_coroutine_threadsafe(gateway.refresh(), gateway.loop).result(5)
    answer = chat(gateway, "bad-key")
    assert answer.status_code == 502 and "as it was registered" in answer.text
    assert "sk-bad" not in answer.text and upstream.asked == []


def test_answers_and_events_over_the_limit_are_refused(gateway, upstream, monkeypatch):
    monkeypatch.setattr(upstream_module, "MAX_ANSWER_BYTES", 10_000)
    monkeypatch.setattr(upstream_module, "MAX_EVENT_BYTES", 10_000)
    upstream.behave = saying(b" " * 10_001)
    assert "10000 bytes" in chat(gateway).json()["error"]["message"]
    for piece in (b"x", b"data: x\n"):  # a line without an end, an event without one
        upstream.behave = saying(piece * 10_001, "text/event-stream")
        assert "10000 bytes" in chat(gateway, stream=True).json()["error"]["message"]


def test_an_upstream_that_is_not_there_is_502(gateway, upstream):
    register(gateway, "no-tls", KEY, url=upstream.url.replace("http:", "https:"))
    answer = chat(gateway, "no-tls")
    assert answer.status_code == 502 and "SSL" in answer.json()["error"]["message"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = taken.getsockname()[1]
        register(gateway, "nobody", KEY, url=f"http://127.0.0.1:{port}/v1")
        answer = chat(gateway, "nobody")
    assert answer.status_code == 502
    error = answer.json()["error"]
    assert "cannot be reached" in error["message"] and error["code"] == "upstream_unavailable"
    register(gateway, "nowhere", KEY, url="http://no-such-host.invalid/v1")
    answer = chat(gateway, "nowhere")
    assert answer.status_code == 502 and "cannot be found" in answer.json()["error"]["message"]


@pytest.mark.parametrize("events", [0, 3])
def test_a_client_that_hangs_up_closes_the_upstreams_connection_at_once(gateway, upstream, events):
    upstream.behave = streaming(*EVENTS[:events], then="silent") if events else silent
    before = metric(gateway, "client_disconnects_total", model="ext")
    connection = keyed_stream(gateway, {"model": "ext", "messages": QUESTION, "stream": events > 0})
    eventually(lambda: upstream.asked, 10, 0.01)
    if events:
        connection.recv(100)
    time.sleep(0.05)
    assert not upstream.hung_up.is_set()
    connection.close()
    assert upstream.hung_up.wait(5), "the upstream goes on for nobody"
    eventually(
        lambda: metric(gateway, "client_disconnects_total", model="ext") == before + 1, 5, 0.01
    )
    assert metric(gateway, "requests_in_flight", model="ext") == 0


def keyed_stream(gateway, body):
    content = json.dumps(body).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
            f"content-length: {len(content)}\r\n\r\n")  # fmt: skip
    connection.sendall(head.encode() + content)
    return connection


def test_a_private_address_is_called_only_where_the_operator_allows_it(upstream):
    """Also where it was registered before the operator took the permission back."""
    with gateway_with_registry([], allowed_upstreams=()) as gateway:
        with gateway.client() as client:
            for url in (upstream.url, upstream.url.replace("127.0.0.1", "2130706433")):
                refused = client.post("/rootsignals/v1/models/", json={"name": "x", "url": url})
                assert refused.status_code == 400
                assert "gateway.allowed_upstreams" in refused.json()["detail"]
            id = register(gateway, "was-fine", url="http://no-such-host.invalid/v1")
            gateway.services.store.registered.change(id, url=upstream.url)
            asyncio.run_coroutine_threadsafe(gateway.refresh(), gateway.loop).result(5)
            body = {"model": "was-fine", "messages": QUESTION}
            answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 502
    assert "gateway.allowed_upstreams" in answer.json()["error"]["message"]
    assert upstream.asked == []


@pytest.mark.parametrize("background", [False, True])
def test_an_external_model_has_no_responses(gateway, upstream, background):
    with openai_of(gateway) as client, pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="ext", input="hi", background=background)
    assert refused.value.param == "model" and "/v1/chat/completions" in refused.value.message
    assert upstream.asked == []


# -- limits


def test_the_registered_limits_hold(gateway, upstream):
    register(gateway, "small", KEY, url=upstream.url, max_token_count=1000,
             max_output_token_count=900)  # fmt: skip
    assert chat(gateway, "small", max_tokens=901).json()["error"]["param"] == "max_tokens"
    long = [{"role": "user", "content": "word " * 2000}]
    assert chat(gateway, "small", messages=long).json()["error"]["code"] == (
        "context_length_exceeded"
    )
    assert upstream.asked == []
    assert chat(gateway, "small", max_tokens=900).status_code == 200
    assert chat(gateway, "small").status_code == 200
    assert [asked.body["max_tokens"] for asked in upstream.asked] == [900, 900]


# -- another gateway as the upstream


def test_another_llm_engine_is_an_upstream_like_any():
    with GatewayThread([fake_endpoint("far")], api_keys=["sk-far"]) as far:
        with gateway_with_registry([], api_keys=[KEY]) as near:
            register(near, "near", KEY, url=f"{far.url}/v1", model="far", default_key="sk-far")
            with openai_of(near) as client:
                chunks = client.chat.completions.create(
                    model="near", messages=QUESTION, max_tokens=3, stream=True
                )
                assert [c.choices[0].delta.content for c in chunks] == ["word "] * 3
                with pytest.raises(openai.BadRequestError) as refused:
                    client.chat.completions.create(model="near", messages=[])
    assert refused.value.param == "messages"
