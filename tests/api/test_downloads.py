"""Files on their way out: ranges, and links that need no key."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from fastapi import Request

from llm_engine.api import downloads
from llm_engine.config_data import StorageSettings
from llm_engine.records import FileRecord
from llm_engine.routing import Balancer
from llm_engine.services import Services
from llm_engine.storage.local import LocalStorage
from tests.support.files import KEY, LIMITS, LINE, clear, http, made, refused
from tests.support.gateway import GatewayThread
from tests.support.upstream import new_key


@pytest.fixture(scope="module")
def gateway():
    with GatewayThread([], sections=LIMITS, api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def ann(gateway):
    return new_key(gateway, KEY, "ann", "files")


@pytest.fixture(autouse=True)
def fresh(gateway):
    yield
    clear(gateway)


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
