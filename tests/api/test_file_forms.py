"""Files on their way in: forms as bytes, limits, and what a refusal leaves."""

import contextlib
import socket
import threading
import time

import httpx
import psutil
import pytest

from llm_engine import files
from tests.support.cluster import eventually
from tests.support.files import (
    KEY,
    LIMITS,
    LINE,
    a_file,
    clear,
    field,
    form,
    http,
    kept,
    made,
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


# -- forms


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
        eventually(lambda: kept(gateway), 15, 0.01, "nothing was written")
    eventually(lambda: kept(gateway) == [], 15, 0.01, "something was left")
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


def test_a_file_whose_record_may_be_there_stays_until_it_is_clear_that_it_is_not(gateway, ann):
    database = gateway.services.store.database
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE files RENAME TO away")
    try:
        assert upload(gateway, ann).status_code == 503
        assert len(kept(gateway)) == 1
    finally:
        with database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO files")
    services = gateway.services
    a_day_later = time.time() + 86400
    assert files.sweep_orphans(services.storage, services.store, a_day_later) == 1
    assert kept(gateway) == []
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
