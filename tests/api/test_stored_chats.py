"""Chat completions with `store: true`, over real sockets, with the real client."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from sference_sdk.client import ApiError

from llm_engine.errors import StoreUnavailable
from llm_engine.signing import Signer, Ticket
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread, fake_endpoint
from tests.support.sference import client_of as sference_of
from tests.support.upstream import (
    KEY,
    Upstream,
    failing,
    gateway_with_registry,
    new_key,
    register,
    saying,
)

HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(upstream: Upstream) -> Iterator[GatewayThread]:
    engines = [
        fake_endpoint("fake"),
        fake_endpoint("other"),
        fake_endpoint("slow", vllm_args={"token_delay_s": 0.05}),
    ]
    with gateway_with_registry(engines, api_keys=[KEY]) as running:
        register(running, "ext", KEY, url=upstream.url, model="theirs", default_key="sk-theirs")
        theirs = {"url": upstream.url, "model": "theirs", "default_key": "sk-theirs"}
        register(running, "shaky", KEY, fallback="fake", **theirs)
        yield running


@pytest.fixture
def client(gateway: GatewayThread, upstream: Upstream) -> Iterator[OpenAI]:
    upstream.reset()
    with client_with(gateway, KEY) as made:
        yield made


def client_with(gateway: GatewayThread, key: str) -> OpenAI:
    return gateway.openai(key)


def say(client: OpenAI, **asked: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "fake", "messages": [HI], "store": True, "max_tokens": 3} | asked
    )


def kept(client: OpenAI, chat: str) -> Any:
    return client.chat.completions.retrieve(chat)


def of(metadata: dict[str, str], client: OpenAI, **asked: Any) -> list[str]:
    found = client.chat.completions.list(metadata=metadata, **asked)
    return [each.id for each in found]


def outage(monkeypatch: pytest.MonkeyPatch, gateway: GatewayThread) -> None:
    def away(record: Any) -> None:
        raise StoreUnavailable("The store does not answer now.", retry_after=5)

    monkeypatch.setattr(gateway.services.store.chats, "add", away)


# -- kept


def test_a_whole_answer_is_kept_as_it_was_told(client: OpenAI):
    made = say(client, metadata={"a": "b"}, seed=7, temperature=0.5, user="ann")
    found = kept(client, made.id)
    told, shown = made.to_dict(), found.to_dict()
    assert told.items() <= shown.items() and made.choices[0].message.content.startswith("7 word")
    assert (found.metadata, found.seed, found.temperature) == ({"a": "b"}, 7, 0.5)
    assert (found.input_user, found.top_p) == ("ann", None)
    assert found.request_id == made._request_id


def test_without_store_nothing_is_kept(client: OpenAI):
    for store in (False, None):
        made = say(client, store=store)
        with pytest.raises(openai.NotFoundError):
            kept(client, made.id)


def test_a_stream_is_kept_before_its_end_is_told(client: OpenAI):
    chunks = list(say(client, stream=True, max_tokens=5))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    found = kept(client, chunks[0].id)
    assert found.object == "chat.completion" and found.model == "fake"
    assert found.choices[0].message.content == "word " * 5
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 5)
    assert found.created == chunks[0].created


def test_usage_is_told_in_a_stream_where_it_was_asked_for(client: OpenAI):
    chunks = list(say(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert kept(client, chunks[0].id).usage == chunks[-1].usage


def test_a_stream_ends_as_others_do(client: OpenAI, gateway: GatewayThread):
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": "fake", "messages": [HI], "store": True, "stream": True, "max_tokens": 2}
    with gateway.client(headers=headers) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and len(events) == 4
    assert answer.headers["x-request-id"]


def test_many_at_once_have_ids_of_their_own(client: OpenAI):
    made: list[str] = []
    ask = [
        threading.Thread(target=lambda: made.append(say(client, metadata={"many": "1"}).id))
        for _ in range(40)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(set(made)) == 40 and set(of({"many": "1"}, client, limit=7)) == set(made)


# -- afterwards


def test_lists_are_in_order_and_in_pages(client: OpenAI):
    mine = {"list": "x"}
    made = [
        say(client, metadata=mine | {"n": str(n)}, model=model).id
        for n, model in enumerate(["fake", "other", "fake", "fake"])
    ]
    assert of(mine, client, limit=2) == made
    assert of(mine, client, limit=3, order="desc") == made[::-1]
    assert of(mine, client, model="other") == [made[1]]
    assert of(mine | {"n": "2"}, client) == [made[2]]
    assert of({'q"[]': "x"}, client) == []
    page = client.chat.completions.list(metadata=mine, after=made[1], limit=1)
    assert [each.id for each in page.data] == [made[2]] and page.has_more
    assert (page.first_id, page.last_id) == (made[2], made[2])


def test_messages_are_what_was_asked(client: OpenAI):
    parts = [{"type": "text", "text": "b"}]
    asked = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "c"},
        HI,
    ]
    made = say(client, messages=asked)
    found = list(client.chat.completions.messages.list(made.id, limit=3))
    assert [each.id for each in found] == [f"{made.id}-{n}" for n in range(4)]
    assert [each.role for each in found] == ["system", "user", "assistant", "user"]
    assert [each.content for each in found] == ["a", None, "c", "hi"]
    assert found[1].content_parts[0].text == "b" and found[0].content_parts is None
    newest = client.chat.completions.messages.list(made.id, order="desc", after=found[2].id)
    assert [each.content for each in newest] == [None, "a"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.messages.list(made.id, after="no")


def test_metadata_changes_and_nothing_else(client: OpenAI):
    made = say(client, metadata={"a": "b"})
    changed = client.chat.completions.update(made.id, metadata={"c": "d"})
    assert changed == kept(client, made.id) and changed.metadata == {"c": "d"}
    assert client.chat.completions.update(made.id, metadata=None).metadata == {}
    for body in ({"metadata": {"a": "\0"}}, {"metadata": {"a": 1}}, {"model": "x"}, {}):
        with pytest.raises(openai.BadRequestError):
            client.post(f"/chat/completions/{made.id}", body=body, cast_to=object)


def test_deleted_it_is_gone(client: OpenAI):
    made = say(client)
    gone = client.chat.completions.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "chat.completion.deleted")
    for ask in (
        kept,
        lambda _, chat: client.chat.completions.delete(chat),
        lambda _, chat: client.chat.completions.update(chat, metadata={}),
        lambda _, chat: client.chat.completions.messages.list(chat),
        lambda _, chat: client.chat.completions.list(after=chat),
    ):
        with pytest.raises(openai.NotFoundError):
            ask(client, made.id)


def test_another_owners_do_not_exist(client: OpenAI, gateway: GatewayThread):
    label = {"owner": "test"}
    mine = say(client, metadata=label)
    with client_with(gateway, new_key(gateway, KEY, "bob", "inference")) as bob:
        theirs = say(bob, metadata=label)
        assert of(label, bob) == [theirs.id]
        for ask in (
            lambda: kept(bob, mine.id),
            lambda: bob.chat.completions.update(mine.id, metadata={}),
            lambda: bob.chat.completions.delete(mine.id),
            lambda: bob.chat.completions.messages.list(mine.id),
            lambda: bob.chat.completions.list(after=mine.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
    assert of(label, client) == [mine.id, theirs.id]  # an operator sees everybody's


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "order=up", "metadata=x", "metadata=null", "metadata[a=b",
     "metadata[a]=%00", "&".join(f"metadata[{n}]=x" for n in range(17))],
)  # fmt: skip
def test_a_wrong_question_is_refused(client: OpenAI, query: str):
    with pytest.raises(openai.BadRequestError):
        client.get(f"/chat/completions?{query}", cast_to=object)


@pytest.mark.parametrize("query", ["model=%00", "model=no", "metadata[]=", "metadata[%22]=x"])
def test_what_nothing_has_gives_an_empty_list(client: OpenAI, query: str):
    found: Any = client.get(f"/chat/completions?{query}", cast_to=object)
    assert found == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


def test_other_methods_are_refused(gateway: GatewayThread):
    with gateway.client(headers={"authorization": f"Bearer {KEY}"}) as http:
        for method in ("PUT", "DELETE", "PATCH"):
            answer = http.request(method, "/v1/chat/completions")
            assert answer.status_code == 405 and answer.json()["error"]["message"]


# -- when something fails


def test_an_outage_of_the_store_is_told_and_models_answer_on(client, gateway, monkeypatch):
    outage(monkeypatch, gateway)
    with pytest.raises(openai.InternalServerError) as whole:
        say(client)
    assert (whole.value.status_code, whole.value.code) == (503, "store_unavailable")
    seen = []
    with pytest.raises(openai.APIError, match="does not answer"):
        for chunk in say(client, stream=True):
            seen.append(chunk)
    assert len(seen) == 3
    assert say(client, store=False).choices


def test_a_refusal_is_the_models_own(client: OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        say(client, model="none")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        say(client, temperature=3)
    with pytest.raises(openai.BadRequestError):
        say(client, metadata={"a": "\0"})


def test_a_stream_that_is_too_long_to_be_kept_says_so(client, monkeypatch):
    monkeypatch.setattr("llm_engine.api.openai.stored_chats.MOST_BYTES", 1000)
    with pytest.raises(openai.APIError, match="the most that can be stored"):
        list(say(client, stream=True, max_tokens=50, metadata={"long": "1"}))
    assert of({"long": "1"}, client) == []


def test_who_leaves_stops_the_engine_and_nothing_is_kept(client, gateway):
    with say(client, model="slow", stream=True, max_tokens=500, metadata={"left": "1"}) as stream:
        next(iter(stream))
    eventually(lambda: gateway.load("slow").depth == 0, 15)
    assert of({"left": "1"}, client) == []


def test_a_fallback_is_named_and_kept_under_its_own(client, gateway, upstream):
    upstream.behave = failing(500)
    for stream in (False, True):
        answer = client.chat.completions.with_raw_response.create(
            model="shaky", messages=[HI], store=True, stream=stream, max_tokens=2
        )
        assert answer.headers["x-llm-engine-served-by"] == "fake"
        told = answer.parse()
        *_, last = told if stream else [told]  # to its end: only then is it kept
        found = kept(client, last.id)
        assert (found.model, found.choices[0].message.content) == ("fake", "word word ")


def test_in_a_batch_it_is_refused(client: OpenAI, gateway: GatewayThread):
    row = {"model": "fake", "messages": [HI], "store": True}
    with sference_of(gateway) as sference, pytest.raises(ApiError, match=r"requests\[0\].*batch"):
        sference.submit_batch(requests=[{"body": row}])
    signer = Signer(gateway.services.store.database.secret())
    ticket = Ticket("batch_1", "ann", False, 0, time.time() + 60)
    with client_with(gateway, signer.ticket(ticket)) as job:
        assert say(job, store=False).choices
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                say(job, stream=stream)
            assert (error.value.code, error.value.param) == ("unsupported_value", "store")


# -- external models


def test_an_external_model_is_kept_too(client: OpenAI, upstream: Upstream):
    made = say(client, model="ext", metadata={"a": "b"})
    assert kept(client, made.id).choices == made.choices
    assert kept(client, made.id).model == "ext"
    body = upstream.asked[-1].body
    assert "store" not in body and "metadata" not in body
    chunks = list(say(client, model="ext", stream=True))
    assert "stream_options" not in upstream.asked[-1].body
    found = kept(client, chunks[0].id)
    assert found.choices[0].message.content == "0 1 2 3 4 " and found.model == "ext"
    assert made.id != chunks[0].id and found.usage is None


def test_an_external_model_that_fails_leaves_nothing(client: OpenAI, upstream: Upstream):
    upstream.behave = failing(500)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError):
            say(client, model="ext", stream=stream, metadata={"broken": "1"})
    upstream.behave = saying(b'{"choices": []}')
    with pytest.raises(openai.InternalServerError):
        say(client, model="ext", metadata={"broken": "1"})
    assert of({"broken": "1"}, client) == []
