"""Pictures are fetched from named hosts alone, and from no address of this machine's networks."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from vqguard.errors import ConfigError
from vqguard.recipes.serving.fetching import (
    Fetcher,
    PublicBackend,
    fetcher,
    is_public,
    read_origin,
    split_url,
)
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.wire.refusals import RequestError

CONTENT = b"a picture's bytes"


class Host(BaseHTTPRequestHandler):
    """Answers by what is asked for."""

    def do_GET(self) -> None:
        size = 5_000 if self.path.startswith("/large") else len(CONTENT)
        status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/picture")
        if self.path != "/large-unsaid":
            self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write((CONTENT * 500)[:size])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(url: str, port: int, allows: Callable[[str], bool] = lambda _: True) -> bytes:
    allowed = frozenset({("http", "localhost", port)})
    return asyncio.run(Fetcher(allowed, 1000, PublicBackend(allows)).fetch(url, "messages.0"))


def test_a_picture_of_a_named_host(port: int) -> None:
    assert fetch(f"http://localhost:{port}/picture?a=b", port) == CONTENT


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/moved", 400, "302"),
        ("/gone", 400, "404"),
        ("/large", 413, "1,000"),
        ("/large-unsaid", 413, "1,000"),
    ],
)
def test_what_is_no_picture_within_the_limits(path: str, status: int, says: str, port: int) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        fetch(f"http://localhost:{port}{path}", port)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/picture",
        "https://localhost:{port}/picture",
        "http://localhost/picture",
        "http://localhost:{port}@example.org/",
        "http://user@localhost:{port}/picture",
        "http://localhost:{port}\\@example.org/",
        "http://localhost.example.org:{port}/picture",
        "http://localhost:{port}/pic ture",
        "http://localhost:{port}/a\r\nHost: b",
        "http://localhost:99999/picture",
        "ftp://localhost:{port}/picture",
        "//localhost:{port}/picture",
        "http://löcalhost:{port}/picture",
        "",
    ],
)
def test_other_addresses(url: str, port: int) -> None:
    with pytest.raises(RequestError) as caught:
        fetch(url.format(port=port), port)
    assert caught.value.status == 400
    assert caught.value.param == "messages.0"


def test_a_named_host_that_lies_here_is_not_asked(port: int) -> None:
    """A name may come to point anywhere after it was put on the list."""
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch(f"http://localhost:{port}/picture", port, is_public)
    with pytest.raises(RequestError, match="cannot be fetched"):
        asyncio.run(
            fetcher([f"http://localhost:{port}"], Limits())(f"http://localhost:{port}/", "")
        )


def test_one_address_of_many_that_lies_here_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(*_: Any, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)),
        ]

    monkeypatch.setattr("anyio.getaddrinfo", two)
    with pytest.raises(RequestError, match="cannot be fetched"):
        asyncio.run(fetcher(["http://example.org"], Limits())("http://example.org/a.png", ""))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_addresses_of_this_machine_and_of_private_networks(address: str) -> None:
    assert not is_public(address)


def test_a_public_address_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    own = SimpleNamespace(family=socket.AF_INET, address="93.184.215.1", netmask="255.255.255.0")
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"eth0": [own]})
    assert not is_public("93.184.215.14")
    assert is_public("93.184.216.14")


def test_the_list_of_hosts() -> None:
    assert read_origin("Example.org") == ("https", "example.org", 443)
    assert read_origin("http://example.org:8080/") == ("http", "example.org", 8080)
    assert split_url("https://example.org/a?b=c") == (("https", "example.org", 443), "/a?b=c")
    for wrong in ("", "ftp://example.org", "example.org/pictures", "https://", "a@b"):
        with pytest.raises(ConfigError):
            read_origin(wrong)
