"""The Root Signals dialect, driven by its own client, and what HTTP alone can show of it."""

import asyncio
import socket

import pytest
from root import RootSignals
from root.generated.openapi_aclient.api.models_api import ModelsApi as AsyncModelsApi
from root.generated.openapi_client.api.models_api import ModelsApi
from root.generated.openapi_client.exceptions import (
    BadRequestException,
    ForbiddenException,
    NotFoundException,
    UnauthorizedException,
)
from root.generated.openapi_client.models.model_request import ModelRequest
from root.generated.openapi_client.models.model_test_request_request import ModelTestRequestRequest
from root.generated.openapi_client.models.patched_model_request import PatchedModelRequest

from tests.support.gateway import fake_endpoint
from tests.support.upstream import (
    Upstream,
    failing,
    gateway_with_registry,
    good,
    new_key,
    register,
    saying,
    silent,
)

KEY = "sk-admin"
THEIR_KEY = "sk-theirs-1234567890"
LONG = "x" * 150


@pytest.fixture(scope="module")
def upstream():
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def gateway():
    endpoints = [fake_endpoint("fake"), fake_endpoint("vectors", task="embed"), fake_endpoint(LONG)]
    with gateway_with_registry(endpoints, api_keys=[KEY], request_timeout_s=2) as running:
        yield running


@pytest.fixture(scope="module")
def team(gateway):
    return new_key(gateway, KEY, "team@example.com", "inference", "models")


@pytest.fixture(autouse=True)
def fresh(gateway, upstream):
    """No model is left from the test before."""
    upstream.reset()
    yield
    with http(gateway) as client:
        for row in client.get("/rootsignals/v1/models/?page_size=1000").json()["results"]:
            if not row["is_local"]:
                client.delete(f"/rootsignals/v1/models/{row['id']}/")


def root_of(gateway, key=KEY):
    return RootSignals(api_key=key, base_url=f"{gateway.url}/rootsignals")


def http(gateway, key=KEY):
    return gateway.client(headers={"authorization": f"Api-Key {key}"})


# -- the client


def test_the_client_creates_lists_and_deletes(gateway, upstream, team):
    root = root_of(gateway, team)
    alias = root.models.create(name="alias", model="fake")
    only_name = root.models.create(name="only-a-name")
    external = root.models.create(
        name="google/gemma", model="theirs", default_key=THEIR_KEY, url=upstream.url,
        max_output_token_count=800, max_token_count=2147483647,
    )  # fmt: skip
    rows = {row.name: row for row in root.models.list()}
    assert {rows["alias"].id, rows["only-a-name"].id, rows["google/gemma"].id} == {
        alias, only_name, external,
    }  # fmt: skip
    assert rows["alias"].visibility == "PRIVATE" and rows["fake"].visibility == "PUBLIC"
    assert rows["alias"].owner.email == rows["alias"].owner.full_name == "team@example.com"
    assert list(root.models.list(limit=0)) == []
    root.models.delete(alias)
    assert "alias" not in {row.name for row in root.models.list()}
    with pytest.raises(NotFoundException):
        root.models.delete(alias)


async def test_the_async_client_does_the_same(gateway, upstream):
    root = RootSignals(api_key=KEY, base_url=f"{gateway.url}/rootsignals", run_async=True)
    id = await root.models.acreate(name="async", url=upstream.url, default_key=THEIR_KEY)
    assert "async" in [row.name async for row in root.models.alist(capable_of=["chat"])]
    async with root.get_client_context() as client:
        found = await AsyncModelsApi(client).models_retrieve(id)
    assert (found.name, found.url) == ("async", upstream.url)
    await root.models.adelete(id)
    assert "async" not in [row.name async for row in root.models.alist()]


def test_what_the_client_registers_answers_under_its_name(gateway, upstream):
    root_of(gateway).models.create(name="mine", model="theirs", url=upstream.url)
    with gateway.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        body = {"model": "mine", "messages": [{"role": "user", "content": "hi"}]}
        answer = client.post("/v1/chat/completions", json=body)
        listed = {row["id"] for row in client.get("/v1/models").json()["data"]}
    assert answer.json()["model"] == "mine" and "mine" in listed


def test_the_generated_calls_retrieve_change_replace_and_verify(gateway, upstream):
    root = root_of(gateway)
    id = root.models.create(name="one", model="theirs", url=upstream.url, default_key=THEIR_KEY)
    with root.get_client_context() as client:
        api = ModelsApi(client)
        assert api.models_retrieve(id).model == "theirs"
        patch = PatchedModelRequest(name="two", max_token_count=5000)
        changed = api.models_partial_update(id, patched_model_request=patch)
        assert (changed.name, changed.url, changed.max_token_count) == ("two", upstream.url, 5000)
        replaced = api.models_update(id, model_request=ModelRequest(name="three", model="fake"))
        assert (replaced.name, replaced.url, replaced.max_token_count) == ("three", None, None)
        request = ModelTestRequestRequest(model="any", url=upstream.url, api_key=THEIR_KEY)
        told = api.models_verify_create(model_test_request_request=request)
    assert told.success and told.response == "hello" and told.usage["total_tokens"] == 9
    assert upstream.asked[-1].headers["authorization"] == f"Bearer {THEIR_KEY}"


def test_the_clients_exceptions_come_with_the_reason(gateway, team):
    with pytest.raises(UnauthorizedException):
        list(root_of(gateway, "sk-wrong").models.list())
    reader = new_key(gateway, KEY, "team@example.com", "inference")
    assert len(list(root_of(gateway, reader).models.list())) == 2
    with pytest.raises(ForbiddenException) as forbidden:
        root_of(gateway, reader).models.create(name="x")
    assert "models" in forbidden.value.body
    root = root_of(gateway, team)
    root.models.create(name="mine")
    for name, word in (("mine", "already"), ("fake", "endpoint")):
        with pytest.raises(BadRequestException) as taken:
            root.models.create(name=name)
        assert word in taken.value.body
    with pytest.raises(NotFoundException):
        root_of(gateway, team).models.delete("mdl_0123")
    with pytest.raises(ForbiddenException):
        root_of(gateway, team).models.delete("fake")


# -- lists


def test_pages_follow_each_other_in_any_order(gateway):
    names = sorted(["fake", "vectors", *(f"m{i}" for i in range(5))])
    for i in range(5):
        register(gateway, f"m{i}", KEY)
    with http(gateway) as client:

        def pages(ordering):
            cursor, found = None, []
            while True:
                query = {"page_size": 3, "ordering": ordering}
                query |= {"cursor": cursor} if cursor else {}
                page = client.get("/rootsignals/v1/models/", params=query).json()
                found.append([row["name"] for row in page["results"]])
                if not (cursor := page["next"]):
                    back = {**query, "cursor": page["previous"]}
                    return found, client.get("/rootsignals/v1/models/", params=back).json()

        for ordering, expected in (("name", names), ("-name", names[::-1])):
            found, before = pages(ordering)
            assert found == [expected[:3], expected[3:6], expected[6:]]
            assert [row["name"] for row in before["results"]] == expected[3:6]
        found, _ = pages("-created_at")
        assert found[:2] == [["m4", "m3", "m2"], ["m1", "m0", "vectors"]]
    with root_of(gateway).get_client_context() as client:
        listed = ModelsApi(client).models_list(ordering="name", page_size=2)
    assert [row.name for row in listed.results] == names[:2]


def test_the_client_walks_all_pages(gateway, monkeypatch):
    monkeypatch.setattr("llm_engine.api.root_signals.LARGEST", 2)
    for i in range(5):
        register(gateway, f"m{i}", KEY)
    root = root_of(gateway)
    assert len(list(root.models.list())) == 7
    assert len(list(root.models.list(limit=5))) == 5


def test_a_page_stays_in_place_while_rows_come_and_go(gateway):
    ids = [register(gateway, f"m{i}", KEY) for i in range(4)]
    with http(gateway) as client:
        query = {"page_size": 2, "ordering": "name", "capable_of": ""}
        first = client.get("/rootsignals/v1/models/", params=query).json()
        assert [row["name"] for row in first["results"]] == ["fake", "m0"]
        client.delete(f"/rootsignals/v1/models/{ids[0]}/")
        query["cursor"] = first["next"]
        second = client.get("/rootsignals/v1/models/", params=query).json()
    assert [row["name"] for row in second["results"]] == ["m1", "m2"]


def test_capabilities_must_all_hold(gateway, upstream):
    register(gateway, "ext", KEY, url=upstream.url)
    register(gateway, "alias", KEY, model="vectors")
    register(gateway, "lost", KEY, model="nowhere")
    root = root_of(gateway)

    def able(*words):
        return {row.name for row in root.models.list(capable_of=list(words))}

    assert able("chat") == {"fake", "ext"} and able("chat", "completion") == {"fake"}
    assert able("embedding") == {"vectors", "alias"}
    assert able("chat", "embedding") == able("vision") == set()


@pytest.mark.parametrize(
    "query",
    ["page_size=0", "page_size=x", "ordering=size", "cursor=x", "cursor=WzFd", "cursor=%00",
     "cursor=WyJjcmVhdGVkX2F0IixmYWxzZSwieCIsIngiXQ=="],
)  # fmt: skip
def test_a_wrong_query_is_400(gateway, query):
    with http(gateway) as client:
        answer = client.get(f"/rootsignals/v1/models/?{query}")
    assert answer.status_code == 400 and isinstance(answer.json()["detail"], str)


def test_rows_that_the_client_would_choke_on_are_put_right(gateway):
    """A name of 150 characters, or a limit below 800, makes it refuse the whole list."""
    id = register(gateway, "low", KEY)
    gateway.services.store.registered.change(id, max_output_token_count=512)
    names = {row.name for row in root_of(gateway).models.list()}
    assert "low" in names and LONG not in names
    with root_of(gateway).get_client_context() as client:
        assert ModelsApi(client).models_retrieve(id).max_output_token_count is None
        assert ModelsApi(client).models_retrieve("fake").max_token_count == 8192


def test_owners_see_their_own_models_only(gateway, team, upstream):
    id = register(gateway, "theirs", KEY, url=upstream.url)
    with http(gateway, team) as client:
        assert "theirs" not in client.get("/rootsignals/v1/models/").text
        for method in ("GET", "PATCH", "DELETE"):
            body = {"content": b"{}"} if method == "PATCH" else {}
            answer = client.request(method, f"/rootsignals/v1/models/{id}/", **body)
            assert answer.status_code == 404
        gateway.services.store.registered.change(id, public=True)
        row = client.get(f"/rootsignals/v1/models/{id}/").json()
        assert row["visibility"] == "PUBLIC" and row["url"] is None
        assert client.delete(f"/rootsignals/v1/models/{id}/").status_code == 403


# -- fields


def test_paths_answer_with_and_without_their_last_slash(gateway):
    with http(gateway) as client:
        for end in ("", "/"):
            made = client.post(f"/rootsignals/v1/models{end}", json={"name": "x"})
            path = f"/rootsignals/v1/models/{made.json()['id']}{end}"
            assert client.get(f"/rootsignals/v1/models{end}").status_code == 200
            assert client.post(f"/rootsignals/v1/models/verify{end}", json={}).status_code == 400
            assert client.get(path).json()["name"] == "x"
            assert client.patch(path, json={}).status_code == 200
            assert client.put(path, json={"name": "x"}).status_code == 200
            deleted = client.delete(path)
            assert (deleted.status_code, deleted.content) == (204, b"")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "two\r\nlines"}, "name"),
        ({"name": " blank"}, "name"),
        ({"name": "x", "max_output_token_count": 799}, "max_output_token_count"),
        ({"name": "x", "max_token_count": -1}, "max_token_count"),
        ({"name": "x", "max_token_count": 2147483648}, "max_token_count"),
        ({"name": "x", "max_token_count": "9"}, "max_token_count"),
        ({"name": "x", "url": "http://x.example/" + "y" * 1024}, "url"),
        ({"name": "x", "url": "ftp://x.example"}, "http://"),
        ({"name": "x", "url": "http://user:password@x.example/"}, "password"),
        ({"name": "x", "url": "http://bücher.example"}, "url"),
        ({"name": "x", "url": "http://169.254.169.254/latest"}, "allowed_upstreams"),
        ({"name": "x", "url": "http://[::ffff:10.0.0.1]/"}, "allowed_upstreams"),
        ({"name": "x", "default_key": "k"}, "default_key"),
        ({"name": "x", "default_key": "a\r\nb", "url": "http://127.0.0.1/"}, "default_key"),
        ({"name": "x", "fallback": "x"}, "fallback"),
        ({"name": "x", "speed": 3}, "speed"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_400_and_named(gateway, body, word):
    with http(gateway) as client:
        answer = client.post("/rootsignals/v1/models/", json=body)
        listed = client.get("/rootsignals/v1/models/").json()["results"]
    assert answer.status_code == 400 and word in answer.json()["detail"]
    assert all(row["is_local"] for row in listed)


def test_absent_stays_and_null_is_cleared(gateway, upstream):
    limits = {"max_token_count": 5000, "max_output_token_count": 900}
    id = register(gateway, "x", KEY, url=upstream.url, default_key=THEIR_KEY, fallback="fake",
                  **limits)  # fmt: skip
    path = f"/rootsignals/v1/models/{id}/"
    with http(gateway) as client:
        assert client.patch(path, json={"max_token_count": None}).json() == {
            **client.get(path).json(), "max_token_count": None, "max_output_token_count": 900,
        }  # fmt: skip
        assert client.get(path).json()["fallback"] == "fake"
        assert sealed(gateway, id) is not None
        assert client.patch(path, json={"fallback": None}).json()["fallback"] is None
        assert client.patch(path, json={"name": None}).status_code == 400
        assert client.patch(path, json={"name": "fake"}).status_code == 400
        assert client.patch(path, json={"model": "other"}).json()["model"] == "other"
        assert sealed(gateway, id) is not None, "the address is the same"
        client.patch(path, json={"default_key": None})
        assert sealed(gateway, id) is None


def test_a_key_is_kept_sealed_and_does_not_follow_to_another_address(gateway, upstream, caplog):
    id = register(gateway, "x", KEY, url=upstream.url, default_key=THEIR_KEY)
    path = f"/rootsignals/v1/models/{id}/"
    secret = sealed(gateway, id)
    assert THEIR_KEY.encode() not in secret
    assert gateway.services.safe.reveal(secret) == THEIR_KEY
    with http(gateway) as client:
        answers = [client.get(path), client.get("/rootsignals/v1/models/"),
                   client.patch(path, json={"default_key": THEIR_KEY})]  # fmt: skip
        assert not any("key" in answer.text for answer in answers)
        client.put(path, json={"name": "x", "url": upstream.url})
        assert sealed(gateway, id) is not None, "PUT by who cannot have read the key"
        client.patch(path, json={"url": f"{upstream.url}/elsewhere"})
    assert sealed(gateway, id) is None
    assert THEIR_KEY not in caplog.text


def sealed(gateway, id):
    return gateway.services.store.registered.get(id).sealed_key


# -- verify


def verify(gateway, key=KEY, **body):
    with http(gateway, key) as client:
        answer = client.post("/rootsignals/v1/models/verify/", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_verify_asks_endpoints_aliases_and_registered_models(gateway, upstream):
    register(gateway, "alias", KEY, model="vectors")
    register(gateway, "ext", KEY, url=upstream.url, default_key=THEIR_KEY, model="theirs")
    assert verify(gateway, model="fake")["response"].startswith("word")
    assert verify(gateway, model="alias")["response"] == "An embedding of 2 numbers."
    told = verify(gateway, model="ext", max_output_token_count=800)
    assert told["success"] and told["model"] == "ext"
    assert upstream.asked[0].headers["authorization"] == f"Bearer {THEIR_KEY}"
    assert upstream.asked[0].body["max_tokens"] == 800
    told = verify(gateway, model="nowhere")
    assert not told["success"] and "does not exist" in told["error"]


def test_verify_knows_an_embedding_model_by_trying(gateway, upstream):
    async def embeds_only(asked, send):
        await (good if asked.path.endswith("/embeddings") else failing(404))(asked, send)

    upstream.behave = embeds_only
    told = verify(gateway, model="any", url=upstream.url)
    assert told["success"] and told["response"] == "An embedding of 2 numbers."


def test_verify_takes_no_number_for_an_embedding(gateway, upstream):
    async def embeds_badly(asked, send):
        answers = saying(b'{"data":[{"embedding":5}]}')
        await (answers if asked.path.endswith("/embeddings") else failing(404))(asked, send)

    upstream.behave = embeds_badly
    told = verify(gateway, model="any", url=upstream.url)
    assert told["success"] is False and told["response"] is None


@pytest.mark.parametrize(
    ("behave", "word"),
    [
        (failing(401), "key"),
        (failing(404), "does not know"),
        (failing(500), "500"),
        (saying(b"<html>"), "OpenAI's form"),
        (saying(b'{"choices":[5]}'), "OpenAI's form"),
        (saying(b'{"choices":{"message":1}}'), "OpenAI's form"),
        (silent, "2 s"),
    ],
)
def test_verify_tells_what_went_wrong_and_does_not_fall_back(gateway, upstream, behave, word):
    register(gateway, "x", KEY, url=upstream.url, fallback="fake")
    upstream.behave = behave
    for body in ({"model": "x"}, {"model": "any", "url": upstream.url}):
        told = verify(gateway, **body)
        assert told["success"] is False and word in told["error"]
        assert told["response"] is None and told["usage"] is None


def test_verify_is_under_the_same_guard(gateway):
    with http(gateway) as client:
        body = {"model": "x", "url": "http://169.254.169.254/latest"}
        answer = client.post("/rootsignals/v1/models/verify/", json=body)
    assert answer.status_code == 400 and "allowed_upstreams" in answer.json()["detail"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "cannot be reached" in verify(gateway, model="x", url=url)["error"]


def test_verify_needs_the_right_to_register_and_to_ask(gateway, upstream):
    asks = new_key(gateway, KEY, "a", "inference")
    registers = new_key(gateway, KEY, "b", "models")
    with http(gateway, asks) as client:
        answer = client.post("/rootsignals/v1/models/verify/", json={"model": "fake"})
        assert answer.status_code == 403
    with http(gateway, registers) as client:
        answer = client.post("/rootsignals/v1/models/verify/", json={"model": "fake"})
        assert answer.status_code == 403
    assert verify(gateway, registers, model="any", url=upstream.url)["success"]


def test_names_that_are_only_tried_leave_no_trace_in_metrics(gateway, upstream):
    verify(gateway, model="only-tried", url=upstream.url)
    with gateway.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        assert "only-tried" not in client.get("/metrics").text


def test_so_many_verifications_run_at_once_and_no_more(gateway, upstream, monkeypatch):
    monkeypatch.setattr("llm_engine.api.root_signals.verify.MOST_AT_ONCE", 2)
    upstream.behave = silent

    async def all_at_once():
        def one():
            with http(gateway) as client:
                body = {"model": "x", "url": upstream.url}
                return client.post("/rootsignals/v1/models/verify/", json=body).status_code

        return await asyncio.gather(*(asyncio.to_thread(one) for _ in range(3)))

    assert sorted(asyncio.run(all_at_once())) == [200, 200, 429]
