"""Where calls to addresses that users have given may go: not into the operator's own network.

The check is at the connection itself, on the very address that is then connected to, so that a
name which resolves otherwise a moment later gains nothing.
"""

import asyncio
import fnmatch
import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore

from llm_engine.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

RESOLVE_TIMEOUT_S = 5
#: Names are looked up by threads of their own: a name server that a user has chosen and that never
#: answers must not hold up what else waits for a thread, such as the store.
_RESOLVERS = ThreadPoolExecutor(16, thread_name_prefix="resolve")
#: What ends in an IPv4 address, and is that address in other clothes: NAT64, IPv4-compatible.
_ENDS_IN_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
#: All of IPv6 that is routed between networks; Python 3.11 takes much of the rest for global, too.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
#: Where clouds tell their machines' credentials. No host name opens these, only their own entry.
_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local: AWS, Azure, Google, ...
        "fe80::/10",
        "fd00:ec2::254/128",  # AWS over IPv6
        "fd20:ce::254/128",  # Google over IPv6
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure's host agent, in public address space
        "192.0.0.0/24",  # Oracle's older one, and what the IETF keeps for protocols
    )
)
_PRINTABLE = re.compile(r"[!-~]+")


class Refused(httpcore.ConnectError):
    """The address lies where upstreams must not."""


class Allowed:
    """Public addresses, and what `gateway.allowed_upstreams` names besides."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._networks = []
        self._hosts = []
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._hosts.append(entry.lower())

    def address(self, host: str, address: str) -> bool:
        """Whether `host` may be connected to at `address`."""
        told = plain(ipaddress.ip_address(address.partition("%")[0]))
        if any(told in network for network in self._networks):
            return True
        if any(told in network for network in _METADATA):
            return False
        return _is_public(told) or any(
            fnmatch.fnmatchcase(host.lower(), pattern) for pattern in self._hosts
        )


def plain(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, where it is only that in other clothes."""
    if isinstance(address, ipaddress.IPv6Address):
        # `::` and `::1` are themselves, and no IPv4 addresses.
        if int(address) > 1 and any(address in network for network in _ENDS_IN_IPV4):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def _is_public(address: Address) -> bool:
    if address.is_multicast or not address.is_global:
        return False
    return isinstance(address, ipaddress.IPv4Address) or address in _GLOBAL_UNICAST


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves by itself, and connects to what it has checked."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        """Tries each address that is allowed, in the resolver's order, within one `timeout`."""
        began = time.monotonic()
        addresses = await resolve(host, port)
        fine = [address for address in addresses if self._allowed.address(host, address)]
        if not fine:
            raise Refused(refusal(host))
        failure: Exception = httpcore.ConnectTimeout("no time was left")
        for index, address in enumerate(fine):
            share = None
            if timeout is not None:
                share = max(0, began + timeout - time.monotonic()) / (len(fine) - index)
            try:
                return await self._inner.connect_tcp(
                    address, port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise Refused("upstreams are not reached through sockets of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def resolve(host: str, port: int) -> list[str]:
    """Raises httpcore.ConnectError for a name that does not resolve."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await loop.run_in_executor(_RESOLVERS, _look_up, host, port)
    except TimeoutError:
        raise httpcore.ConnectError(f"the host {host} was not found in time") from None
    except (OSError, UnicodeError):
        raise httpcore.ConnectError(f"the host {host} cannot be found") from None
    return list(dict.fromkeys(found))


def _look_up(host: str, port: int) -> list[str]:
    return [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


async def check(allowed: Allowed, url: str, param: str = "url") -> None:
    """Refuse early what could never be called. Raises InvalidRequest."""
    try:
        if not _PRINTABLE.fullmatch(url):
            raise ValueError("characters that no URL has")
        parsed = httpcore.URL(url)
        scheme, host, port = parsed.scheme.decode(), parsed.host.decode(), parsed.port
    except (ValueError, TypeError):
        raise InvalidRequest(f"'{param}' is not a URL.", param=param) from None
    if scheme not in ("http", "https") or not host:
        raise InvalidRequest(f"'{param}' must begin with http:// or https://.", param=param)
    if "@" in re.split(r"[/?#]", url.split("//", 1)[1], maxsplit=1)[0]:
        raise InvalidRequest(f"'{param}' must not hold a user or password.", param=param)
    if "#" in url:
        raise InvalidRequest(f"'{param}' must not have a fragment (#).", param=param)
    try:
        addresses = await resolve(host, port or 443)
    except httpcore.ConnectError:
        return  # it may be found by the time it is called
    if not any(allowed.address(host, address) for address in addresses):
        raise InvalidRequest(f"'{param}': {refusal(host)}.", param=param, code="forbidden_address")


def refusal(host: str) -> str:
    return (
        f"{host} lies in a private network, where upstreams are not called; an operator can allow "
        "it in gateway.allowed_upstreams"
    )
