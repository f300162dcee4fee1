"""/v1/files, driven by OpenAI's own client, and what HTTP alone can show of it."""

import asyncio
import re
import time

import httpx
import openai
import pytest

from llm_engine.store.idempotency import KEPT_S
from tests.support.files import (
    KEY,
    LIMITS,
    LINE,
    clear,
    http,
    kept,
    made,
    official,
    refused,
    upload,
)
from tests.support.gateway import GatewayThread
from tests.support.upstream import new_key


@pytest.fixture(scope="module")
def gateway():
    with GatewayThread([], sections=LIMITS, api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def ann(gateway):
    return new_key(gateway, KEY, "ann", "files")


@pytest.fixture(scope="module")
def ben(gateway):
    return new_key(gateway, KEY, "ben", "files")


@pytest.fixture(autouse=True)
def fresh(gateway):
    yield
    clear(gateway)


# -- the client


def test_the_client_creates_reads_lists_and_deletes(gateway, ann):
    with official(gateway, ann) as client:
        file = client.files.create(file=("rows.jsonl", LINE * 3), purpose="batch")
        assert re.fullmatch("file-[0-9a-f]{26}", file.id)
        assert (file.object, file.filename, file.purpose) == ("file", "rows.jsonl", "batch")
        assert (file.bytes, file.status, file.status_details) == (57, "processed", None)
        assert abs(file.created_at - time.time()) < 5
        assert file.expires_at - file.created_at == 30 * 86400
        assert client.files.retrieve(file.id) == file
        assert client.files.wait_for_processing(file.id) == file
        assert client.files.content(file.id).read() == LINE * 3
        assert [each.id for each in client.files.list(purpose="batch")] == [file.id]
        assert list(client.files.list(purpose="vision")) == []
        gone = client.files.delete(file.id)
        assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                ask(file.id)


async def test_the_async_client_does_the_same(gateway, ann):
    async with official(gateway, ann, openai.AsyncOpenAI) as client:
        made = await asyncio.gather(
            *(client.files.create(file=(f"{n}.txt", b"%d" % n), purpose="assistants")
              for n in range(8))
        )  # fmt: skip
        assert [f.expires_at for f in made] == [None] * 8
        assert {f.id async for f in client.files.list(limit=3)} == {f.id for f in made}
        assert await client.files.wait_for_processing(made[3].id) == made[3]
        assert (await client.files.content(made[3].id)).read() == b"3"
        async with client.files.with_streaming_response.content(made[4].id) as answer:
            assert [piece async for piece in answer.iter_bytes()] == [b"4"]


@pytest.mark.parametrize(
    "purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
)
def test_every_purpose_that_clients_have(gateway, ann, purpose):
    row = made(gateway, ann, purpose=purpose)
    assert row["purpose"] == purpose
    assert (row["expires_at"] is None) == (purpose != "batch")
    assert set(row) == {
        "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status",
        "status_details",
    }  # fmt: skip


@pytest.mark.parametrize("purpose", ["batch_output", "fine-tune-results", "assistants_output", ""])
def test_purposes_of_results_are_not_for_uploads(gateway, ann, purpose):
    refused(upload(gateway, ann, purpose=purpose), param="purpose", code="invalid_value")


def test_a_file_expires_when_it_was_asked_to(gateway, ann):
    with official(gateway, ann) as client:
        after = {"anchor": "created_at", "seconds": 3600}
        file = client.files.create(file=("a", b"1"), purpose="vision", expires_after=after)
        assert file.expires_at - file.created_at == 3600
        gateway.services.store.files.expire(file.id)
        assert list(client.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            client.files.content(file.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
      "expires_after.seconds"),
     ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
      "expires_after.seconds"),
     ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"},
      "expires_after.seconds"),
     ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
     ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
     ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
     ({"colour": "red"}, "colour")],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(gateway, ann, fields, param):
    refused(upload(gateway, ann, **fields), param=param)


# -- lists


def test_pages_in_both_orders(gateway, ann):
    ids = [made(gateway, ann)["id"] for _ in range(5)]
    with official(gateway, ann) as client:
        assert [f.id for f in client.files.list(limit=2)] == ids[::-1]
        assert [f.id for f in client.files.list(limit=2, order="asc")] == ids
    with http(gateway, ann) as client:
        page = client.get("/v1/files", params={"limit": 2, "order": "asc", "after": ids[1]}).json()
        assert (page["object"], page["has_more"]) == ("list", True)
        assert (page["first_id"], page["last_id"]) == (ids[2], ids[3])
        empty = client.get("/v1/files", params={"after": ids[0]}).json()
        assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)
        assert empty["has_more"] is False


def test_a_client_can_delete_as_it_lists(gateway, ann):
    ids = {made(gateway, ann)["id"] for _ in range(5)}
    with official(gateway, ann) as client:
        assert {client.files.delete(f.id).id for f in client.files.list(limit=2)} == ids
        assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"), ("order=up", "order"),
     ("after=nonsense", "after"), ("purpose=%00", "purpose")],
)  # fmt: skip
def test_a_query_that_is_wrong_is_named(gateway, ann, query, param):
    with http(gateway, ann) as client:
        refused(client.get(f"/v1/files?{query}"), param=param, code="invalid_value")


# -- what batches ask of a file


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_file"), (b"\n \r\n", "empty_file"), (b"x", "invalid_json_line"),
     (b"[1]\n", "invalid_json_line"), (b'{"a": \n', "invalid_json_line")],
)  # fmt: skip
def test_a_batch_file_that_is_empty_or_malformed_is_refused(gateway, ann, content, code):
    answer = upload(gateway, ann, content, purpose="batch")
    refused(answer, param="file", code=code)
    assert kept(gateway) == []


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + LINE, b"\r\n\n" + LINE + b"garbage", LINE.strip()]
)
def test_a_bom_and_blank_lines_are_no_matter(gateway, ann, content):
    assert made(gateway, ann, content, purpose="batch")["bytes"] == len(content)


def test_a_batch_file_is_named_jsonl_and_has_a_limit_of_its_own(gateway, ann):
    refused(upload(gateway, ann, name="a.json", purpose="batch"), code="invalid_file_format")
    made(gateway, ann, name="A.JSONL", purpose="batch")
    large = LINE + b"x" * (2 * 2**20)
    message = refused(upload(gateway, ann, large, purpose="batch"), 413, param="file")
    assert "batches.max_file_bytes" in message
    made(gateway, ann, large, purpose="user_data")


# -- who may


def test_another_owners_file_does_not_exist(gateway, ann, ben):
    row = made(gateway, ann)
    path = f"/v1/files/{row['id']}"
    everyone = {ann: 200, ben: 404, KEY: 200}
    for key, status in everyone.items():
        with http(gateway, key) as client:
            listed = [each["id"] for each in client.get("/v1/files").json()["data"]]
            assert listed == ([row["id"]] if status == 200 else [])
            assert client.get(path).status_code == status
            assert client.get(f"{path}/content").status_code == status
    with http(gateway, ben) as client:
        assert client.delete(path).status_code == 404
    with http(gateway, KEY) as client:
        assert client.delete(path).status_code == 200


def test_without_the_scope_or_a_key_nothing_is_to_be_had(gateway, ann):
    path = f"/v1/files/{made(gateway, ann)['id']}"
    scopeless = new_key(gateway, KEY, "ann", "inference", "models")
    for key, status, code in [(scopeless, 403, "insufficient_permissions"), (None, 401, None)]:
        with http(gateway, key) as client:
            for answer in (client.get("/v1/files"), client.get(path), client.delete(path),
                           client.get(f"{path}/content"), client.post("/v1/files")):  # fmt: skip
                refused(answer, status, **({"code": code} if code else {}))


@pytest.mark.parametrize("id", ["file-none", "%00", "file-%00", "x" * 3000, "%2e%2e%2fa"])
def test_an_id_that_is_none(gateway, ann, id):
    with http(gateway, ann) as client:
        for answer in (client.get(f"/v1/files/{id}/content"), client.delete(f"/v1/files/{id}")):
            refused(answer, 404)


# -- the same request again


def again(gateway, key, *given, **options):
    return upload(gateway, key, *given, headers={"idempotency-key": "k-1"}, **options)


def test_the_same_request_makes_one_file(gateway, ann, ben):
    first, second = again(gateway, ann).json(), again(gateway, ann).json()
    assert first == second and len(kept(gateway)) == 1
    assert again(gateway, ben).json()["id"] != first["id"]  # a key is its owner's


@pytest.mark.parametrize(
    "changes", [{"content": LINE * 2}, {"name": "b.jsonl"}, {"purpose": "vision"}]
)
def test_another_request_with_the_same_key_is_a_conflict(gateway, ann, changes):
    again(gateway, ann)
    refused(again(gateway, ann, **changes), 409, code="idempotency_key_reused")
    assert len(kept(gateway)) == 1


def test_many_at_once_with_one_key_make_one_file(gateway, ann):
    async def all_at_once():
        headers = {"authorization": f"Bearer {ann}", "idempotency-key": "k-2"}
        async with httpx.AsyncClient(
            base_url=gateway.url, headers=headers, trust_env=False, timeout=20
        ) as client:
            return await asyncio.gather(
                *(client.post("/v1/files", files={"file": ("a", LINE)}, data={"purpose": "vision"})
                  for _ in range(10))
            )  # fmt: skip

    answers = asyncio.run(all_at_once())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == len(kept(gateway)) == 1


def test_a_key_is_free_once_its_file_is_gone_and_has_a_length(gateway, ann):
    first = again(gateway, ann).json()["id"]
    gateway.services.store.files.expire(first)
    gateway.services.storage.delete(f"files/{first}")
    assert again(gateway, ann).json()["id"] != first
    refused(upload(gateway, ann, headers={"idempotency-key": "k" * 256}))
    assert KEPT_S == 24 * 3600
