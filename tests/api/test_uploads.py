"""/v1/uploads, driven by OpenAI's own client, and what HTTP alone can show of it."""

import asyncio
import hashlib
import random
import time

import httpx
import openai
import pytest

from llm_engine import files
from llm_engine.store.uploads import GRACE_S
from tests.support.files import KEY, LINE, a_file, clear, form, http, kept, official, refused
from tests.support.gateway import GatewayThread
from tests.support.upstream import new_key

LIMITS = {
    "files": {"max_part_bytes": 2**20, "max_upload_bytes": 2**23, "max_parts": 12,
              "upload_timeout_s": 3600},
    "batches": {"max_file_bytes": 2**20},
}  # fmt: skip
NEW = {"filename": "a.bin", "bytes": 6, "mime_type": "text/plain", "purpose": "user_data"}


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


@pytest.fixture
def client(gateway, ann):
    with http(gateway, ann) as client:
        yield client


@pytest.fixture(autouse=True)
def fresh(gateway):
    """Whatever has ended leaves nothing but its file."""
    yield
    services = gateway.services
    for upload in services.store.uploads.overdue(time.time() + 2 * 86400, 1000):
        services.store.uploads.cancel(upload.id)
        files.drop_parts(services.storage, upload.id)
    clear(gateway)


def new(client, **changes):
    answer = client.post("/v1/uploads", json=NEW | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def send(client, upload, data=b"abc", **headers):
    files = {"data": ("upload", data)}
    return client.post(f"/v1/uploads/{upload}/parts", files=files, headers=headers)


def part(client, upload, data=b"abc"):
    answer = send(client, upload, data)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def complete(client, upload, *parts, **extras):
    return client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": parts, **extras})


def cancel(client, upload):
    return client.post(f"/v1/uploads/{upload}/cancel")


def content(client, answer):
    return client.get(f"/v1/files/{answer.json()['file']['id']}/content").content


# -- the client


def test_the_client_uploads_a_file_in_chunks(gateway, ann, tmp_path):
    data = random.Random(1).randbytes(5 * 2**20 + 17)
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with official(gateway, ann) as client:
        done = client.uploads.upload_file_chunked(
            file=path, mime_type="text/plain", purpose="user_data", part_size=2**20,
            md5=hashlib.md5(data).hexdigest(),
        )  # fmt: skip
        assert (done.status, done.object, done.bytes) == ("completed", "upload", len(data))
        assert done.file is not None and done.file.filename == "data.bin"
        assert client.files.retrieve(done.file.id) == done.file
        assert client.files.content(done.file.id).read() == data
    assert len(kept(gateway)) == 1  # the parts are gone


async def test_the_async_client_sends_parts_in_parallel_and_in_any_order(gateway, ann):
    pieces = [bytes([n]) * 1000 for n in range(10)]
    async with official(gateway, ann, openai.AsyncOpenAI) as client:
        upload = await client.uploads.create(
            bytes=10_000, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        assert (upload.status, upload.file) == ("pending", None)
        assert upload.expires_at - upload.created_at == 3600
        parts = await asyncio.gather(
            *(client.uploads.parts.create(upload.id, data=piece) for piece in reversed(pieces))
        )
        assert {(each.object, each.upload_id) for each in parts} == {("upload.part", upload.id)}
        order = [each.id for each in reversed(parts)]
        done = await client.uploads.complete(upload.id, part_ids=order)
        assert (await client.files.content(done.file.id)).read() == b"".join(pieces)
        again = await client.uploads.upload_file_chunked(
            file=b"", filename="empty.txt", bytes=0, mime_type="text/plain", purpose="vision"
        )
        assert (again.status, again.file.bytes) == ("completed", 0)


def test_the_client_cancels(gateway, ann):
    with official(gateway, ann) as client:
        upload = client.uploads.create(**NEW)
        client.uploads.parts.create(upload.id, data=b"abc")
        assert client.uploads.cancel(upload.id).status == "cancelled"
        assert kept(gateway) == []
        assert client.uploads.cancel(upload.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.uploads.parts.create(upload.id, data=b"abc")
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.uploads.complete(upload.id, part_ids=[])


# -- create


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"purpose": "batch_output"}, "purpose"), ({"purpose": None}, "purpose"),
     ({"bytes": -1}, "bytes"), ({"bytes": "many"}, "bytes"), ({"filename": ""}, "filename"),
     ({"filename": "a/"}, "filename"), ({"filename": 1}, "filename"),
     ({"mime_type": ""}, "mime_type"), ({"mime_type": "x" * 300}, "mime_type"),
     ({"mime_type": "a\u0000b"}, "mime_type"), ({"colour": "red"}, "colour"),
     ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
     ({"purpose": "batch"}, "filename")],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(client, changes, param):
    refused(client.post("/v1/uploads", json=NEW | changes), param=param)


def test_a_field_that_lacks_is_named(client):
    for name in NEW:
        body = {key: value for key, value in NEW.items() if key != name}
        answer = client.post("/v1/uploads", json=body)
        refused(answer, param=name, code="missing_required_parameter")


def test_a_file_that_would_be_too_large_is_not_begun(client):
    too_large = client.post("/v1/uploads", json=NEW | {"bytes": 2**23 + 1})
    assert "files.max_upload_bytes" in refused(too_large, 413, param="bytes")
    batch = {"bytes": 2**20 + 1, "purpose": "batch", "filename": "a.jsonl"}
    too_large = client.post("/v1/uploads", json=NEW | batch)
    assert "batches.max_file_bytes" in refused(too_large, 413, param="bytes")


def test_the_file_expires_from_when_it_is_complete(client):
    after = {"expires_after": {"anchor": "created_at", "seconds": 7200}}
    upload = new(client, **after)
    file = complete(client, upload, part(client, upload), part(client, upload)).json()["file"]
    assert file["expires_at"] - file["created_at"] == 7200
    upload = new(client, purpose="batch", filename="dir/a.jsonl", bytes=len(LINE))
    file = complete(client, upload, part(client, upload, LINE)).json()["file"]
    assert file["expires_at"] - file["created_at"] == 30 * 86400
    assert file["filename"] == "a.jsonl"


# -- parts


def test_a_part_that_is_too_large_or_empty(gateway, client):
    upload = new(client, bytes=2**22)
    message = refused(send(client, upload, b"x" * (2**20 + 1)), 413, param="data")
    assert "files.max_part_bytes" in message
    part(client, upload, b"x" * 2**20)
    refused(send(client, upload, b""), param="data")
    small = new(client)
    refused(send(client, small, b"1234567"), param="data", code="upload_too_large")
    assert len(kept(gateway)) == 1


def test_parts_are_bounded(client):
    upload = new(client, bytes=100)
    for _ in range(12):
        part(client, upload)
    assert "files.max_parts" in refused(send(client, upload), code="too_many_parts")


@pytest.mark.parametrize(
    ("body", "param"),
    [(form(a_file()), "file"), (form(), "data"), (form(a_file(of=b"data"))[:-10], None),
     (form(a_file(of=b"data"), a_file(of=b"data")), "data")],
)  # fmt: skip
def test_a_form_that_is_wrong_leaves_nothing(gateway, client, body, param):
    upload = new(client, bytes=1000)
    answer = client.post(
        f"/v1/uploads/{upload}/parts", content=body,
        headers={"content-type": "multipart/form-data; boundary=B"},
    )  # fmt: skip
    refused(answer, param=param)
    assert kept(gateway) == []


# -- complete


def test_the_order_is_the_callers(client):
    upload = new(client)
    a, b = part(client, upload, b"abc"), part(client, upload, b"xyz")
    assert content(client, complete(client, upload, b, a)) == b"xyzabc"


def test_parts_that_are_not_named_are_left_out_and_forgotten(gateway, client):
    upload = new(client)
    part(client, upload, b"old")
    done = complete(client, upload, part(client, upload), part(client, upload))
    assert content(client, done) == b"abcabc"
    assert len(kept(gateway)) == 1


def test_what_does_not_add_up_is_refused_and_can_be_put_right(client):
    upload, other = new(client), new(client)
    a, b, theirs = part(client, upload), part(client, upload), part(client, other)
    refused(complete(client, upload, a), param="part_ids", code="bytes_mismatch")
    refused(complete(client, upload, a, b, a), param="part_ids", code="invalid_part")
    refused(complete(client, upload, a, theirs), param="part_ids", code="invalid_part")
    refused(complete(client, upload, a, "part_none"), param="part_ids", code="invalid_part")
    refused(complete(client, upload, a, b, md5="0" * 32), param="md5", code="md5_mismatch")
    refused(complete(client, upload, a, b, md5="short"), param="md5")
    refused(complete(client, upload, a, b, colour="red"), param="colour")
    refused(client.post(f"/v1/uploads/{upload}/complete", json={}), param="part_ids")
    md5 = hashlib.md5(b"abcabc").hexdigest().upper()
    assert complete(client, upload, a, b, md5=md5).json()["status"] == "completed"


def test_the_input_of_a_batch_is_checked_once_it_is_whole(gateway, client):
    upload = new(client, purpose="batch", filename="a.jsonl", bytes=6)
    parts = [part(client, upload), part(client, upload)]
    refused(complete(client, upload, *parts), code="invalid_json_line")
    assert not [path for path in kept(gateway) if path.parent.name == "files"]


def test_a_completion_that_is_sent_again_tells_of_the_same_file(client):
    upload = new(client)
    parts = [part(client, upload), part(client, upload)]
    first, second = complete(client, upload, *parts), complete(client, upload, *parts)
    assert second.status_code == 200 and first.json() == second.json()
    other = complete(client, upload, *reversed(parts))
    refused(other, param="upload_id", code="upload_completed")
    refused(cancel(client, upload), code="upload_completed")
    refused(send(client, upload), code="upload_completed")


def test_completing_many_times_at_once_makes_one_file(gateway, ann, client):
    upload = new(client, bytes=4 * 2**20)
    parts = [part(client, upload, b"x" * 2**20) for _ in range(4)]

    async def all_at_once():
        headers = {"authorization": f"Bearer {ann}"}
        async with httpx.AsyncClient(
            base_url=gateway.url, headers=headers, trust_env=False, timeout=20
        ) as client:
            path = f"/v1/uploads/{upload}/complete"
            return await asyncio.gather(
                *(client.post(path, json={"part_ids": parts}) for _ in range(8))
            )

    answers = asyncio.run(all_at_once())
    assert {answer.status_code for answer in answers} == {200}, answers[-1].text
    assert len({answer.json()["file"]["id"] for answer in answers}) == len(kept(gateway)) == 1


def test_the_upload_tells_when_its_file_is_deleted(client):
    upload = new(client, bytes=3)
    its_part = part(client, upload)
    file = complete(client, upload, its_part).json()["file"]["id"]
    client.delete(f"/v1/files/{file}")
    assert complete(client, upload, its_part).json()["file"] is None


# -- expiry


def test_an_upload_expires(gateway, client):
    upload = new(client)
    its_part = part(client, upload)
    over = gateway.services.store.uploads.get(upload).expires_at + GRACE_S + 1
    files.sweep(gateway.services.storage, gateway.services.store, over)
    assert kept(gateway) == []
    for answer in (send(client, upload), complete(client, upload, its_part)):
        refused(answer, param="upload_id", code="upload_expired")
    refused(cancel(client, upload), code="upload_expired")


# -- who may


def test_another_owners_upload_does_not_exist(gateway, client, ben):
    upload = new(client)
    its_part = part(client, upload)
    with http(gateway, ben) as other:
        for answer in (send(other, upload), complete(other, upload, its_part),
                       cancel(other, upload), cancel(other, "upload_none"),
                       cancel(other, "%00")):  # fmt: skip
            refused(answer, 404, param="upload_id")
    with http(gateway, KEY) as admin:
        second = part(admin, upload)
        done = complete(admin, upload, its_part, second)
    assert content(client, done) == b"abcabc"  # it is its owner's, whoever completes it


def test_without_the_scope_or_a_key_nothing_is_to_be_had(gateway, client):
    upload = new(client)
    for key, status in [(new_key(gateway, KEY, "ann", "inference"), 403), (None, 401)]:
        with http(gateway, key) as other:
            for answer in (other.post("/v1/uploads", json=NEW), send(other, upload),
                           complete(other, upload), cancel(other, upload)):  # fmt: skip
                refused(answer, status)


# -- the same request again


def test_the_same_request_makes_one_upload_and_one_part(gateway, client):
    key = {"idempotency-key": "k"}
    first = client.post("/v1/uploads", json=NEW, headers=key).json()
    assert client.post("/v1/uploads", json=NEW, headers=key).json() == first
    other = client.post("/v1/uploads", json=NEW | {"bytes": 7}, headers=key)
    refused(other, 409, code="idempotency_key_reused")
    parts = [send(client, first["id"], **key).json() for _ in range(2)]
    assert parts[0] == parts[1] and len(kept(gateway)) == 1
    refused(send(client, first["id"], b"xyz", **key), 409, code="idempotency_key_reused")
