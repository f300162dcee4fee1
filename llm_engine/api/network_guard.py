"""Where calls to addresses that users have given may go: not into the operator's own network.

The check is at the connection itself, on the very address that is then connected to, so that a
name which resolves otherwise a moment later gains nothing.
"""

import asyncio
import fnmatch
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore

from llm_engine.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: Where clouds tell their machines' credentials.
_LINK_LOCAL = (ipaddress.ip_network("169.254.0.0/16"), ipaddress.ip_network("fe80::/10"))


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
        if any(told in network for network in _LINK_LOCAL):
            return False
        named = any(fnmatch.fnmatch(host.lower(), pattern) for pattern in self._hosts)
        return named or (told.is_global and not told.is_multicast)


def plain(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, where it is only that in other clothes."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


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
        addresses = await resolve(host, port)
        fine = [address for address in addresses if self._allowed.address(host, address)]
        if not fine:
            raise Refused(refusal(host))
        return await self._inner.connect_tcp(fine[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise Refused("upstreams are not reached through sockets of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def resolve(host: str, port: int) -> list[str]:
    """Raises httpcore.ConnectError for a name that does not resolve."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise httpcore.ConnectError(f"the host {host} cannot be found") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


async def check(allowed: Allowed, url: str, param: str = "url") -> None:
    """Refuse early what could never be called. Raises InvalidRequest."""
    try:
        parsed = httpcore.URL(url)
        scheme, host, port = parsed.scheme.decode(), parsed.host.decode(), parsed.port
    except (ValueError, UnicodeError, httpcore.UnsupportedProtocol):
        raise InvalidRequest(f"'{param}' is not a URL.", param=param) from None
    if scheme not in ("http", "https") or not host:
        raise InvalidRequest(f"'{param}' must begin with http:// or https://.", param=param)
    if "@" in url.split("//", 1)[1].split("/", 1)[0]:
        raise InvalidRequest(f"'{param}' must not hold a user or password.", param=param)
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
