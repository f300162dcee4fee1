"""Which addresses a call for a user may go to. The resolver is replaced where no real name would
answer as needed; connections are real."""

import asyncio
import socket

import httpcore
import pytest

from llm_engine.api import network_guard
from llm_engine.api.network_guard import Allowed, GuardedBackend, Refused, check, resolve
from llm_engine.errors import InvalidRequest

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0",
    "169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "64:ff9b:1::1", "5f00::1", "2001:db8::1", "2001:0:53aa:64c:0:5efe:7f00:1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
    "64:ff9b::10.0.0.1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public_is_refused(address):
    assert not Allowed([]).address("any.example", address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_is_allowed(address):
    assert Allowed([]).address("any.example", address)


def test_an_operator_allows_addresses_networks_and_hosts():
    allowed = Allowed(["127.0.0.1", "10.1.0.0/16", "fd00::/8", "*.Corp.example", "gpu"])
    assert allowed.address("x", "127.0.0.1") and allowed.address("x", "::ffff:127.0.0.1")
    assert not allowed.address("x", "127.0.0.2")
    assert allowed.address("x", "10.1.2.3") and not allowed.address("x", "10.2.0.1")
    assert allowed.address("x", "fd00::7")
    assert allowed.address("LLM.corp.example", "192.168.0.9")
    assert allowed.address("gpu", "192.168.0.9")
    assert not allowed.address("corp.example.evil", "192.168.0.9")


def test_no_host_name_opens_the_addresses_where_credentials_are():
    names = Allowed(["*"])
    for address in ("169.254.169.254", "fe80::1", "fd00:ec2::254", "100.100.100.200",
                    "168.63.129.16", "::ffff:169.254.169.254"):  # fmt: skip
        assert not names.address("any", address)
        assert Allowed([address]).address("any", address) or address.startswith("::ffff")
    assert names.address("any", "10.0.0.1")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "localhost",
     "LOCALHOST", "[::1]", "[::ffff:7f00:1]"],
)  # fmt: skip
async def test_an_address_is_the_same_however_it_is_written(host):
    with pytest.raises(InvalidRequest, match="private network") as refused:
        await check(Allowed([]), f"http://{host}:8080/v1")
    assert refused.value.code == "forbidden_address"


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://8.8.8.8/", "file:///etc/passwd", "http://", "http:8.8.8.8", "//8.8.8.8/",
     "http://u@8.8.8.8/", "http://u:p@8.8.8.8/", "http://8.8.8.8:x/", "http://8.8.8.8:99999/",
     "http://8.8.8.8/#a", "http://8.8.8.8/a b", "http://8.8.8.8/\r\nx: y", "http://bücher.example/",
     "http://[::1/", "http://8.8.8.8\\@127.0.0.1/", "ht\ntp://8.8.8.8/"],
)  # fmt: skip
async def test_what_is_no_plain_url_is_refused(url):
    with pytest.raises(InvalidRequest) as refused:
        await check(Allowed(["0.0.0.0/0"]), url)
    assert refused.value.param == "url"


@pytest.mark.parametrize(
    "url", ["https://8.8.8.8/v1", "http://8.8.8.8:8000/a@b?c=d@e", "HTTPS://[2606:4700::1]/"]
)
async def test_a_public_url_is_fine(url):
    await check(Allowed([]), url)


async def test_a_name_that_does_not_resolve_yet_may_be_registered():
    await check(Allowed([]), "https://no-such-host.invalid/v1")


async def test_a_name_server_that_never_answers_is_given_up(monkeypatch):
    import threading

    release = threading.Event()
    monkeypatch.setattr(network_guard, "RESOLVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(5) and [])
    try:
        with pytest.raises(httpcore.ConnectError, match="in time"):
            await resolve("slow.example", 80)
        # The store's threads are others.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 1) == 1
    finally:
        release.set()


@pytest.fixture
def names(monkeypatch):
    """What names resolve to."""
    known: dict[str, list[str]] = {}

    def look_up(host, port):
        if host in known:
            return known[host]
        return [host]

    monkeypatch.setattr(network_guard, "_look_up", look_up)
    return known


@pytest.fixture
async def listening():
    """A port of 127.0.0.1 that takes connections; 127.0.0.2 has nobody at the same port."""
    met = []

    async def meet(reader, writer):
        met.append(writer.get_extra_info("sockname")[0])
        writer.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1], met
    server.close()
    await server.wait_closed()


async def test_the_next_address_is_tried_where_the_first_refuses(names, listening):
    port, met = listening
    names["two.example"] = ["127.0.0.2", "127.0.0.1"]
    stream = await GuardedBackend(Allowed(["127.0.0.0/8"])).connect_tcp("two.example", port, 5)
    assert await stream.read(1) == b""
    await stream.aclose()
    assert met == ["127.0.0.1"]


async def test_of_a_name_with_both_only_the_public_address_is_connected_to(names, listening):
    """The private one comes first, and somebody listens there; 127.0.0.2 stands for a public one
    where nobody does."""
    port, met = listening
    names["mixed.example"] = ["127.0.0.1", "127.0.0.2"]
    with pytest.raises(httpcore.ConnectError) as failed:
        await GuardedBackend(Allowed(["127.0.0.2"])).connect_tcp("mixed.example", port, 5)
    assert not isinstance(failed.value, Refused) and met == []
    await check(Allowed(["127.0.0.2"]), f"http://mixed.example:{port}/")


async def test_a_name_that_has_turned_private_since_it_was_checked_is_refused(names, listening):
    port, met = listening
    names["turns.example"] = ["8.8.8.8"]
    await check(Allowed([]), f"http://turns.example:{port}/")
    names["turns.example"] = ["127.0.0.1"]
    with pytest.raises(Refused, match="allowed_upstreams"):
        await GuardedBackend(Allowed([])).connect_tcp("turns.example", port, 5)
    assert met == []


async def test_sockets_of_this_machine_are_refused(tmp_path):
    with pytest.raises(Refused):
        await GuardedBackend(Allowed(["*"])).connect_unix_socket(str(tmp_path / "socket"))
