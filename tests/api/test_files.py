"""/v1/files, driven by OpenAI's own client, and what HTTP alone can show of it."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from fastapi import Request

from llm_engine import files
from llm_engine.api import downloads
from llm_engine.config_data import StorageSettings
from llm_engine.records import FileRecord
from llm_engine.routing import Balancer
from llm_engine.services import Services
from llm_engine.storage.local import LocalStorage
from llm_engine.store.idempotency import KEPT_S
from tests.support.cluster import eventually
from tests.support.gateway import GatewayThread
from tests.support.upstream import new_key

KEY = "sk-admin"
LINE = b'{"custom_id": "a"}\n'
LIMITS = {
    "files": {"max_bytes": 4 * 2**20, "max_files": 40},
    "batches": {"max_file_bytes": 2 * 2**20},
}


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
    """No file is left from the test before, and none of them has left bytes without a record."""
    yield
    with http(gateway, KEY) as client:
        for row in client.get("/v1/files").json()["data"]:
            assert client.delete(f"/v1/files/{row['id']}").status_code == 200
    files.sweep(gateway.services.storage, gateway.services.store, time.time())
    eventually(lambda: kept(gateway) == [], 5, 0.05, "bytes are left")


def http(gateway, key=None, **options):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return gateway.client(headers=headers | options.pop("headers", {}), **options)


def official(gateway, key, kind=openai.OpenAI):
    return kind(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def kept(gateway):
    """Every file in the storage's folder, those that are being written too."""
    folder = Path(gateway.settings.storage_url)
    return [path for path in folder.rglob("*") if path.is_file()]


def upload(gateway, key, content=LINE, name="a.jsonl", purpose="user_data", **options):
    headers = options.pop("headers", {})
    with http(gateway, key, headers=headers) as client:
        return client.post(
            "/v1/files", files={"file": (name, content)}, data={"purpose": purpose, **options}
        )


def made(gateway, key, *given, **options):
    answer = upload(gateway, key, *given, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status=400, **facts):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error | facts) == (status, error), answer.text
    return error["message"]


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


# -- forms


def form(*parts, end=b"--B--\r\n"):
    """A body of (headers, content), byte by byte as it is given."""
    return b"".join(b"--B\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + end


def field(name, value):
    return b'Content-Disposition: form-data; name="%b"' % name, value


def a_file(content=LINE, name=b"a.jsonl", of=b"file"):
    return b'Content-Disposition: form-data; name="%b"; filename="%b"' % (of, name), content


def send(gateway, key, body, kind="multipart/form-data; boundary=B"):
    with http(gateway, key, headers={"content-type": kind}) as client:
        return client.post("/v1/files", content=body)


PURPOSE = field(b"purpose", b"batch")


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_fields_come_in_any_order_and_in_any_pieces(gateway, ann, size):
    anchor = field(b"expires_after[anchor]", b"created_at")
    seconds = field(b"expires_after[seconds]", b"7200")
    content = LINE + b"\r\n--\r\n--B\r\r\n--" * 9  # almost the boundary
    for parts in ([a_file(content), PURPOSE, seconds, anchor],
                  [anchor, a_file(content), seconds, PURPOSE]):  # fmt: skip
        body = form(*parts)
        pieces = (body[at : at + size] for at in range(0, len(body), size))
        answer = send(gateway, ann, pieces)
        assert answer.status_code == 200, answer.text
        row = answer.json()
        assert row["purpose"] == "batch" and row["expires_at"] - row["created_at"] == 7200
        with http(gateway, ann) as client:
            assert client.get(f"/v1/files/{row['id']}/content").content == content


def test_a_batch_file_that_comes_before_its_purpose_is_checked_too(gateway, ann):
    refused(send(gateway, ann, form(a_file(b"nonsense"), PURPOSE)), code="invalid_json_line")
    refused(send(gateway, ann, form(a_file(name=b"a.csv"), PURPOSE)), code="invalid_file_format")
    large = form(a_file(LINE + b"x" * 2**21), PURPOSE)
    assert "batches.max_file_bytes" in refused(send(gateway, ann, large), 413)


@pytest.mark.parametrize(
    ("body", "facts"),
    [(form(PURPOSE), {"param": "file", "code": "missing_required_parameter"}),
     (form(a_file()), {"param": "purpose", "code": "missing_required_parameter"}),
     (form(), {"param": "file"}),
     (b"", {"code": "invalid_multipart"}),
     (b"hello", {"code": "invalid_multipart"}),
     (form(PURPOSE, a_file(), end=b""), {"code": "invalid_multipart"}),
     (form(PURPOSE, a_file())[:-20], {"code": "invalid_multipart"}),
     (form(PURPOSE, a_file(), a_file()), {"param": "file", "code": "too_many_files"}),
     (form(PURPOSE, PURPOSE, a_file()), {"param": "purpose", "code": "duplicate_parameter"}),
     (form(PURPOSE, a_file(of=b"other")), {"param": "file"}),
     (form(PURPOSE, a_file(), a_file(of=b"other")), {"param": "other"}),
     (form(PURPOSE, (b"X-Nothing: 1", b"")), {"param": "file"}),
     (form(PURPOSE, field(b"file", LINE)), {"param": "file", "code": "invalid_filename"}),
     (form(field(b"purpose", b"x" * 5000), a_file()), {"param": "purpose"}),
     (form(*[field(b"f%d" % n, b"") for n in range(40)]), {"code": "invalid_multipart"}),
     (form((b"X-Huge: " + b"x" * 10_000, b"")), {"code": "invalid_multipart"}),
     (form((b"\r\n".join(b"X-%d: 1" % n for n in range(20)), b"")), {"code": "invalid_multipart"}),
     (form((b"no colon here", b"")), {"code": "invalid_multipart"}),
     (form(PURPOSE, a_file(name=b"")), {"code": "invalid_filename"}),
     (form(PURPOSE, a_file(name=b"/tmp/")), {"code": "invalid_filename"}),
     (form(PURPOSE, a_file(name=b"..")), {"code": "invalid_filename"}),
     (form(PURPOSE, a_file(name=b"x" * 1100 + b".jsonl")), {"code": "invalid_filename"})],
)  # fmt: skip
def test_a_form_that_is_wrong_says_how_and_leaves_nothing(gateway, ann, body, facts):
    refused(send(gateway, ann, body), **facts)
    assert kept(gateway) == []


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
     "multipart/form-data; boundary=" + "x" * 100, "multipart/mixed; boundary=B"],
)  # fmt: skip
def test_a_content_type_that_is_no_form(gateway, ann, kind):
    refused(send(gateway, ann, form(PURPOSE, a_file()), kind), code="invalid_content_type")


@pytest.mark.parametrize(
    ("sent", "name"),
    [("häßlich 文件 🙂.jsonl".encode(), "häßlich 文件 🙂.jsonl"),
     (b"../../etc/passwd.jsonl", "passwd.jsonl"), (b"C:\\files\\a.jsonl", "a.jsonl"),
     (b"a\x00\x1f\xc2\x85b.jsonl", "ab.jsonl"), (b"bad \xff utf.jsonl", "bad \ufffd utf.jsonl"),
     (b" spaces .jsonl ", "spaces .jsonl"), (b"se;mi.jsonl", "se;mi.jsonl")],
)  # fmt: skip
def test_a_name_loses_its_path_and_nothing_else(gateway, ann, sent, name):
    if b"\x00" in sent:  # not even in a multipart header; JSON and `filename*` could bring it
        headers = b"Content-Disposition: form-data; name=\"file\"; filename*=utf-8''a%00%1Fb.jsonl"
        answer = send(gateway, ann, form(PURPOSE, (headers, LINE)))
    else:
        answer = send(gateway, ann, form(PURPOSE, a_file(name=sent)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == name
    with http(gateway, ann) as client:
        told = client.get(f"/v1/files/{answer.json()['id']}/content").headers
    assert told["content-disposition"].startswith('attachment; filename="')
    if not name.isascii():
        assert f"filename*=UTF-8''{httpx.URL('http://x', path='/' + name).raw_path[1:].decode()}" \
            in told["content-disposition"]  # fmt: skip


# -- limits, and what a refusal leaves


@pytest.mark.parametrize("told", [True, False], ids=["by its length", "as it comes"])
def test_a_file_that_is_too_large(gateway, ann, told):
    body = form(PURPOSE, a_file(b"x" * 5 * 2**20))
    answer = send(gateway, ann, body if told else iter([body[:100], body[100:]]))
    assert "files.max_bytes" in refused(answer, 413, param="file", code="request_too_large")
    assert kept(gateway) == []


def test_a_file_of_just_the_limit_is_taken(gateway, ann):
    limit = LIMITS["files"]["max_bytes"]
    assert made(gateway, ann, b"x" * limit)["bytes"] == limit
    refused(upload(gateway, ann, b"x" * (limit + 1)), 413)


def test_an_owner_has_at_most_so_many(gateway, ben):
    ids = [made(gateway, ben)["id"] for _ in range(LIMITS["files"]["max_files"])]
    message = refused(upload(gateway, ben), code="too_many_files")
    assert "files.max_files" in message
    with http(gateway, ben) as client:
        client.delete(f"/v1/files/{ids[0]}")
    made(gateway, ben)


def test_a_client_that_hangs_up_leaves_nothing(gateway, ann):
    body = form(PURPOSE, a_file(LINE + b"x" * 2**20))
    host, port = gateway.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ann}\r\n"
        f"content-type: multipart/form-data; boundary=B\r\ncontent-length: {2**22}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body[:-20])
        eventually(lambda: kept(gateway), 5, 0.01, "nothing was written")
    eventually(lambda: kept(gateway) == [], 5, 0.01, "something was left")
    with http(gateway, ann) as client:
        assert client.get("/v1/files").json()["data"] == []


def test_a_storage_that_does_not_work_is_an_outage(gateway, ann, monkeypatch, tmp_path):
    row = made(gateway, ann)
    (tmp_path / "no folder").touch()
    with monkeypatch.context() as patch:
        patch.setattr(gateway.services.storage, "_folder", tmp_path / "no folder" / "storage")
        refused(upload(gateway, ann), 503, code="storage_unavailable")
        with http(gateway, ann) as client:
            assert client.get(f"/v1/files/{row['id']}").json() == row
    made(gateway, ann)


def test_a_file_without_a_record_is_not_kept(gateway, ann):
    database = gateway.services.store.database
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE files RENAME TO away")
    try:
        assert upload(gateway, ann).status_code == 503
        assert kept(gateway) == []
    finally:
        with database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO files")
    made(gateway, ann)


def test_a_download_that_is_given_up_is_closed(gateway, ann):
    file = made(gateway, ann, b"x" * 4 * 2**20)["id"]
    folder = gateway.settings.storage_url
    with http(gateway, ann) as client, client.stream("GET", f"/v1/files/{file}/content") as answer:
        next(answer.iter_raw())
    eventually(
        lambda: not [f for f in psutil.Process().open_files() if f.path.startswith(folder)],
        5, 0.05, "it is still open",
    )  # fmt: skip


# -- ranges


@pytest.mark.parametrize(
    ("asked", "status", "expected", "told"),
    [("bytes=0-4", 206, b"01234", "bytes 0-4/10"), ("bytes=7-", 206, b"789", "bytes 7-9/10"),
     ("bytes=-3", 206, b"789", "bytes 7-9/10"), ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
     ("bytes=9-9", 206, b"9", "bytes 9-9/10"), ("bytes=5-99999", 206, b"56789", "bytes 5-9/10"),
     ("bytes=3-2", 200, b"0123456789", None), ("bytes=0-1,3-4", 200, b"0123456789", None),
     ("lines=1-2", 200, b"0123456789", None), ("bytes=-", 200, b"0123456789", None),
     ("bytes=x-y", 200, b"0123456789", None)],
)  # fmt: skip
def test_a_range(gateway, ann, asked, status, expected, told):
    path = f"/v1/files/{made(gateway, ann, b'0123456789')['id']}/content"
    with http(gateway, ann, headers={"range": asked}) as client:
        answer, head = client.get(path), client.head(path)
    assert (answer.status_code, answer.content) == (status, expected)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["accept-ranges"] == "bytes"
    for each in (answer, head):
        assert each.headers["content-length"] == str(len(expected))
        assert each.headers.get("content-range") == told
    assert (head.status_code, head.content) == (status, b"")


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_a_range_behind_the_end(gateway, ann, asked):
    path = f"/v1/files/{made(gateway, ann, b'0123456789')['id']}/content"
    with http(gateway, ann, headers={"range": asked}) as client:
        answer = client.get(path)
    refused(answer, 416, code="invalid_range")
    assert answer.headers["content-range"] == "bytes */10"


def test_a_download_goes_on_where_it_was_cut_off_if_it_is_the_same_file(gateway, ann):
    path = f"/v1/files/{made(gateway, ann, b'0123456789')['id']}/content"
    with http(gateway, ann) as client:
        etag = client.get(path).headers["etag"]
        same = client.get(path, headers={"range": "bytes=5-", "if-range": etag})
        other = client.get(path, headers={"range": "bytes=5-", "if-range": '"another"'})
    assert (same.status_code, same.content) == (206, b"56789")
    assert (other.status_code, other.content) == (200, b"0123456789")


def test_an_empty_file(gateway, ann):
    row = made(gateway, ann, b"")
    with http(gateway, ann) as client:
        answer = client.get(f"/v1/files/{row['id']}/content")
        assert (row["bytes"], answer.status_code, answer.content) == (0, 200, b"")
        ranged = client.get(f"/v1/files/{row['id']}/content", headers={"range": "bytes=0-"})
        assert ranged.status_code == 416


def test_bytes_that_are_lost_are_not_found(gateway, ann):
    row = made(gateway, ann)
    gateway.services.storage.delete(f"files/{row['id']}")
    with http(gateway, ann) as client:
        refused(client.get(f"/v1/files/{row['id']}/content"), 404)


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


# -- links


def signed(gateway, file, seconds=60):
    signer = asyncio.run_coroutine_threadsafe(gateway.services.signer(), gateway.loop).result(5)
    expires = int(time.time()) + seconds
    return {"expires": expires, "signature": signer.sign_link(file, expires)}


def test_a_link_opens_one_file_without_a_key(gateway, ann):
    mine, other = made(gateway, ann), made(gateway, ann)
    query = signed(gateway, mine["id"])
    path = "/v1/files/{}/content"
    with http(gateway) as client:
        answer = client.get(path.format(mine["id"]), params=query)
        assert (answer.status_code, answer.content) == (200, LINE)
        ranged = client.get(path.format(mine["id"]), params=query, headers={"range": "bytes=0-0"})
        assert (ranged.status_code, ranged.content) == (206, b"{")
        assert client.head(path.format(mine["id"]), params=query).status_code == 200
        wrong = client.get(path.format(other["id"]), params=query)
        refused(wrong, 401, code="invalid_signature")


def test_a_link_opens_nothing_else(gateway, ann):
    file = made(gateway, ann)["id"]
    query = signed(gateway, file)
    with http(gateway) as client:
        for method, path in [
            ("GET", f"/v1/files/{file}"), ("DELETE", f"/v1/files/{file}"), ("GET", "/v1/files"),
            ("POST", f"/v1/files/{file}/content"), ("DELETE", f"/v1/files/{file}/content"),
            ("GET", f"/llm-engine/v1/files/{file}/content"), ("GET", "/v1/keys"),
            ("GET", f"/v1/files/{file}/content/"), ("GET", f"/v1/files/a/{file}/content"),
        ]:  # fmt: skip
            assert client.request(method, path, params=query).status_code == 401, (method, path)


def test_a_link_ends(gateway, ann):
    file = made(gateway, ann)["id"]
    with http(gateway) as client:
        answer = client.get(f"/v1/files/{file}/content", params=signed(gateway, file, -1))
        refused(answer, 401, code="link_expired")
        client.headers["authorization"] = f"Bearer {ann}"
        client.delete(f"/v1/files/{file}")
        del client.headers["authorization"]
        gone = client.get(f"/v1/files/{file}/content", params=signed(gateway, file))
        refused(gone, 404)


@pytest.mark.parametrize(
    "change",
    [{"signature": "x"}, {"signature": ""}, {"signature": "é"}, {"expires": "4102444800"},
     {"expires": ""}, {"expires": "soon"}, {"expires": "٣"}, {"expires": "9" * 40}],
)  # fmt: skip
def test_a_link_that_was_changed(gateway, ann, change):
    file = made(gateway, ann)["id"]
    with http(gateway) as client:
        answer = client.get(f"/v1/files/{file}/content", params=signed(gateway, file) | change)
        refused(answer, 401, code="invalid_signature")
        unsigned = client.get(f"/v1/files/{file}/content", params={"expires": "1"})
        refused(unsigned, 401)


def came_to(gateway, **headers):
    """A request as some route of another dialect has it."""
    host = gateway.url.removeprefix("http://")
    raw = [(name.replace("_", "-").encode(), value.encode())
           for name, value in ({"host": host} | headers).items()]  # fmt: skip
    return Request({"type": "http", "method": "GET", "scheme": "http", "path": "/sference/x",
                    "query_string": b"", "headers": raw, "server": ("10.0.0.1", 9)})  # fmt: skip


def test_a_link_leads_to_the_address_that_the_request_came_to(gateway, ann):
    record = gateway.services.store.files.get(made(gateway, ann)["id"])

    def link(services, **headers):
        making = downloads.link(services, came_to(gateway, **headers), record)
        return asyncio.run_coroutine_threadsafe(making, gateway.loop).result(5)

    url = link(gateway.services)
    assert httpx.get(url, trust_env=False).content == LINE
    assert 3590 < int(httpx.URL(url).params["expires"]) - time.time() <= 3600
    url = link(gateway.services, host="llm.example:444", x_forwarded_proto="https")
    assert url.startswith(f"https://llm.example:444/v1/files/{record.id}/content?expires=")


class Direct(LocalStorage):
    """One that can be reached by clients, as S3 can."""

    def link(self, key, seconds, filename):
        return f"https://s3.example/{key}?name={filename}&seconds={seconds}"


@pytest.mark.parametrize("direct", [True, False])
async def test_a_link_leads_to_the_storage_itself_where_that_is_wished(gateway, direct):
    storage = StorageSettings(direct_links=direct, link_expires_s=60)
    services = Services(
        gateway.settings.model_copy(update={"storage": storage}), Balancer(), gateway.services.store
    )
    services.storage = Direct(Path(gateway.settings.storage_url))
    record = FileRecord("file-1", "ann", "vision", "a", 1, 0.0, "files/file-1")
    url = await downloads.link(services, came_to(gateway), record)
    assert (url == "https://s3.example/files/file-1?name=a&seconds=60") is direct
    assert url.startswith(gateway.url) is not direct


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


# -- memory


@pytest.mark.slow
def test_two_hundred_megabytes_pass_through_a_few(tmp_path):
    size, piece = 200 * 2**20, b"x" * 2**20
    head, tail = form(field(b"purpose", b"user_data"), a_file(b"\0")).split(b"\0")

    def body():
        yield head
        yield from (piece for _ in range(size // len(piece)))
        yield tail

    with GatewayThread([]) as gateway, http(gateway, timeout=120) as client:
        client.get("/health")
        with at_most(48 * 2**20):
            answer = client.post(
                "/v1/files", content=body(),
                headers={"content-type": "multipart/form-data; boundary=B"},
            )  # fmt: skip
        assert answer.json()["bytes"] == size
        with at_most(48 * 2**20), client.stream(
            "GET", f"/v1/files/{answer.json()['id']}/content"
        ) as down:  # fmt: skip
            assert sum(len(each) for each in down.iter_raw()) == size


@contextlib.contextmanager
def at_most(grown):
    """This process, which is client and gateway, does not grow by more bytes meanwhile."""
    process, done = psutil.Process(), threading.Event()
    before = largest = process.memory_info().rss

    def watch():
        nonlocal largest
        while not done.wait(0.01):
            largest = max(largest, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
    assert largest - before < grown
