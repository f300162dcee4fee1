"""What only S3 has: presigned links, parts, encryption. Looked at by a client that is not ours."""

import time
from urllib.parse import quote

import httpx
import psutil
import pytest

from llm_engine.errors import ConfigError
from llm_engine.storage import s3
from llm_engine.storage.s3 import S3Storage
from tests.support.s3 import S3Server

AN_HOUR = 3600


@pytest.fixture
def make(server: S3Server):
    """`make(**settings)`: a storage in a fresh bucket, and that bucket's name."""

    def making(**settings: object) -> tuple[S3Storage, str]:
        url = server.new_bucket()
        return S3Storage(url, server.settings(**settings)), url.removeprefix("s3://")

    return making


# Links.


def test_a_link_needs_no_key_of_ours(make):
    storage, _ = make()
    storage.put("files/a b", b"0123456789")
    link = storage.link("files/a b", AN_HOUR, "results.jsonl")
    assert httpx.get(link).content == b"0123456789"
    part = httpx.get(link, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")


@pytest.mark.parametrize(
    ("filename", "plain"),
    [
        ("results.jsonl", "results.jsonl"),
        ("ergebnisse für 日本.jsonl", "ergebnisse f_r __.jsonl"),
        ('a"b\\c%41\r\nset-cookie: x', "a_b_c_41__set-cookie: x"),
        ("lone \ud800", "lone _"),
    ],
)
def test_a_link_names_the_file(make, filename, plain):
    storage, _ = make()
    storage.put("a", b"x")
    told = httpx.get(storage.link("a", AN_HOUR, filename)).headers["content-disposition"]
    exact = quote(filename, safe="", errors="replace")
    assert told == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"


@pytest.mark.s3real
@pytest.mark.parametrize("server", ["ceph"], indirect=True)
def test_a_link_ends(make):
    storage, _ = make()
    storage.put("a", b"x")
    link = storage.link("a", 2, "a.txt")
    assert httpx.get(link).status_code == 200
    time.sleep(3)
    assert httpx.get(link).status_code == 403


@pytest.mark.s3real
@pytest.mark.parametrize("server", ["ceph"], indirect=True)
def test_a_link_opens_nothing_else(make):
    storage, bucket = make()
    storage.put("a", b"x")
    storage.put("b", b"y")
    link = storage.link("a", AN_HOUR, "a.txt")
    assert httpx.get(link.replace(f"{bucket}/a?", f"{bucket}/b?")).status_code == 403
    assert httpx.get(link.replace("a.txt", "b.exe")).status_code == 403
    assert httpx.delete(link).status_code == 403
    assert httpx.get(link.partition("?")[0]).status_code == 403


# Parts.


def test_a_small_object_is_one_request_and_a_large_one_has_parts(make, server):
    storage, bucket = make()
    storage.put("small", bytes(s3.PART))
    storage.put("large", bytes(s3.PART + 1))
    listed = server.client.list_objects_v2(Bucket=bucket)["Contents"]
    etags = {each["Key"]: each["ETag"] for each in listed}
    assert "-" not in etags["small"]
    assert etags["large"].strip('"').endswith("-2")


def test_parts_grow_so_that_ten_thousand_suffice(make, server, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 * 2**20)  # the least that S3 takes
    monkeypatch.setattr(s3, "_PARTS_OF_A_SIZE", 2)
    storage, bucket = make()
    with storage.writer("a") as writer:
        writer.write(bytes(35 * 2**20))
        writer.write(b"!")
        [upload] = server.client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        parts = server.client.list_parts(Bucket=bucket, Key="a", UploadId=upload["UploadId"])
        assert [part["Size"] >> 20 for part in parts["Parts"]] == [5, 5, 10, 10]
    assert storage.stat("a").bytes == 35 * 2**20 + 1


def test_ten_thousand_parts_hold_terabytes():
    assert sum(s3.PART << (n // s3._PARTS_OF_A_SIZE) for n in range(10_000)) > 8 * 10**12


def test_an_exception_leaves_no_parts_to_pay_for(make, server):
    storage, bucket = make()
    with pytest.raises(KeyError), storage.writer("a") as writer:
        writer.write(bytes(s3.PART + 1))
        assert server.client.list_multipart_uploads(Bucket=bucket)["Uploads"]
        raise KeyError
    assert server.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


@pytest.mark.parametrize("taken", [0, 1])
def test_what_is_not_read_to_its_end_keeps_no_connection(make, server, taken):
    def connections() -> int:
        here = psutil.Process().net_connections("tcp")
        return sum(1 for each in here if each.raddr and each.raddr.port == server.port)

    storage, _ = make()
    storage.put("a", bytes(2 * s3.PART))
    storage.client.close()
    before = connections()
    pieces = storage.read("a")
    for _ in range(taken):
        next(pieces)
    assert connections() == before + 1
    pieces.close()
    assert connections() == before


def test_folders_that_consoles_make_are_no_objects(make, server):
    storage, bucket = make()
    server.client.put_object(Bucket=bucket, Key="files/", Body=b"")
    storage.put("files/a", b"x")
    assert [found.key for found in storage.list("files/")] == ["files/a"]


def test_the_prefix_is_where_a_person_looks(server):
    url = server.new_bucket()
    storage = S3Storage(f"{url}/team/llm/", server.settings())
    storage.put("files/a", b"x")
    other = S3Storage(f"{url}/team/llm2", server.settings())
    other.put("files/b", b"x")
    listed = server.client.list_objects_v2(Bucket=url.removeprefix("s3://"))["Contents"]
    assert [each["Key"] for each in listed] == ["team/llm/files/a", "team/llm2/files/b"]
    assert [found.key for found in storage.list("")] == ["files/a"]
    assert storage.shown == f"{url}/team/llm"


# Encryption. (Ceph's has no keys here.)


@pytest.mark.parametrize("server", ["moto"], indirect=True)
@pytest.mark.parametrize("size", [10, s3.PART + 1], ids=["small", "in parts"])
def test_encryption_is_asked_for_with_every_object(make, server, size):
    storage, bucket = make(s3_encryption="aws:kms", s3_kms_key="some-key")
    storage.put("put", bytes(size))
    storage.create("created", bytes(size))
    for key in ("put", "created"):
        found = server.client.head_object(Bucket=bucket, Key=key)
        assert found["ServerSideEncryption"] == "aws:kms"
        assert found["SSEKMSKeyId"].endswith("some-key")
        assert b"".join(storage.read(key)) == bytes(size)


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_encryption_with_the_servers_own_key(make, server):
    storage, bucket = make(s3_encryption="AES256")
    storage.put("a", b"x")
    found = server.client.head_object(Bucket=bucket, Key="a")
    assert found["ServerSideEncryption"] == "AES256"


# What can never work.


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://b", "s3://bu cket/x", "s3://bucket/a/../b"]
)
def test_urls_that_cannot_be(server, url):
    with pytest.raises(ConfigError, match=r"storage\.url"):
        S3Storage(url, server.settings())


@pytest.mark.parametrize(
    "endpoint",
    ["minio:9000", "ftp://minio", "http://", "http://user:pw@minio", "http://minio:port"],
)
def test_endpoints_that_cannot_be(server, endpoint):
    with pytest.raises(ConfigError, match=r"storage\.s3_endpoint_url") as told:
        S3Storage("s3://bucket", server.settings(s3_endpoint_url=endpoint))
    assert "pw" not in str(told.value)
