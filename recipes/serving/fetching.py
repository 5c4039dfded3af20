"""Pictures from hosts that the operator has named, and from nowhere else.

A server that fetches what strangers name is a way into its own network. So an address must begin
with an origin of the list; the name is resolved once, every address that it gives must lie outside
of this machine and its networks, and the connection goes to the address that was looked at.
Redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpcore2 as httpcore
import psutil

from vqguard.errors import ConfigError
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.wire.refusals import RequestError, bad_request, too_large

_PORTS = {"https": 443, "http": 80}
_TARGET = re.compile(r"[!-~]*")
_CONNECT_SECONDS = 5.0
_SECONDS = 15.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Origin = tuple[str, str, int]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Fetch = Callable[[str, str], Coroutine[Any, Any, bytes]]


def fetcher(hosts: Iterable[str], limits: Limits) -> Fetch:
    """What gets a picture's file by its address: `fetch(url, param)`.

    Args:
        hosts: `example.org` (https), or an origin as in `http://example.org:8080`.
        limits: bound a file's size.

    Raises:
        ConfigError: a host that cannot be read.
    """
    allowed = frozenset(map(read_origin, hosts))
    return Fetcher(allowed, limits.body_bytes, PublicBackend(is_public)).fetch


def read_origin(host: str) -> Origin:
    """`(scheme, host, port)` of an entry of the list.

    Raises:
        ConfigError: it is none.
    """
    try:
        origin, target = split_url(host if "://" in host else f"https://{host}")
    except ValueError as error:
        raise ConfigError(f"image host {host!r}: {error}") from error
    if target != "/":
        raise ConfigError(f"image host {host!r}: expected a host alone, without a path")
    return origin


def split_url(url: str) -> tuple[Origin, str]:
    """An address's origin, and what is asked of it.

    Raises:
        ValueError: not http or https, with a user's name, or with characters that addresses have
            not.
    """
    if not _TARGET.fullmatch(url) or "\\" in url:
        raise ValueError("expected an address of printable ASCII, blanks written as %20")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError("expected an address that begins with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("expected an address without a user's name")
    port = parts.port or _PORTS[parts.scheme]
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return (parts.scheme, parts.hostname.lower().rstrip("."), port), target


def is_public(address: str) -> bool:
    """Whether an address lies outside of this machine and of the networks it is in."""
    try:
        number = _carried(ipaddress.ip_address(address))
    except ValueError:  # with the name of an interface, which is always a local one
        return False
    if not number.is_global or number.is_multicast:
        return False
    return not any(number in network for network in _own_networks())


class Fetcher:
    """Gets files from a list of origins."""

    def __init__(
        self, allowed: frozenset[Origin], most: int, backend: httpcore.AsyncNetworkBackend
    ) -> None:
        """`most`: bytes of a file."""
        self.allowed = allowed
        self.most = most
        self.backend = backend

    async def fetch(self, url: str, param: str) -> bytes:
        """The file at an address.

        Raises:
            RequestError: 400 or 413 naming `param`.
        """
        try:
            origin, target = split_url(url)
        except ValueError as error:
            raise _refusal(str(error), param) from error
        if origin not in self.allowed:
            raise _refusal("pictures are not fetched from this host", param)
        try:
            with anyio.fail_after(_SECONDS):
                return await self._get(origin, target, param)
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise _refusal(f"the host took longer than {_SECONDS:g} seconds", param) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise _refusal(f"it cannot be fetched ({type(error).__name__})", param) from error

    async def _get(self, origin: Origin, target: str, param: str) -> bytes:
        scheme, host, port = origin
        url = httpcore.URL(scheme=scheme, host=host, port=port, target=target)
        headers = {
            "Host": host if port == _PORTS[scheme] else f"{host}:{port}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": "vqguard",
        }
        pieces: list[bytes] = []
        size = 0
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=ssl.create_default_context(), network_backend=self.backend
            ) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            if response.status != 200:
                raise _refusal(f"the host answered {response.status}, not 200", param)
            async for piece in response.aiter_stream():
                size += len(piece)
                if size > self.most:
                    raise too_large("bytes of a picture", self.most, param)
                pieces.append(piece)
        return b"".join(pieces)


class PublicBackend(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were looked at, if all of them may be."""

    def __init__(self, allows: Callable[[str], bool]) -> None:
        self.allows = allows
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """As the library's, by name."""
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(place[4][0]) for place in found]
        if not addresses or not all(map(self.allows, addresses)):
            raise httpcore.ConnectError("an address of this machine or its networks")
        wait = _CONNECT_SECONDS if timeout is None else timeout
        return await self._inner.connect_tcp(addresses[0], port, wait, *args, **options)


def _carried(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)


def _own_networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    networks = []
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                host = each.address.partition("%")[0]
                try:
                    network = ipaddress.ip_network(f"{host}/{each.netmask}", strict=False)
                except ValueError:  # an IPv6 mask that is written as an address
                    network = ipaddress.ip_network(host)
                networks.append(network)
    return networks


def _refusal(reason: str, param: str) -> RequestError:
    return bad_request(f"the picture's address: {reason}", "invalid_image_url", param)
