"""An ASGI application on a port, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn

from vqguard.errors import ConfigError
from vqguard.recipes.serving.door.admission import App

_KEEP_ALIVE = 5  # seconds that an idle connection stays open
_BACKLOG = 256


class _Server(uvicorn.Server):
    """Says when it listens; a signal ends it once, and no process dies of it."""

    def __init__(
        self, config: uvicorn.Config, listens: Callable[[str], None], reload: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._listens = listens
        self._reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say the address once connections are taken."""
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP"):  # not on Windows
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, self._reload))
        if self.started and sockets:
            self._listens(address_of(sockets[0]))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Uvicorn would raise the signal again when it has stopped; a drained server exits 0."""
        kept = {number: signal.signal(number, self._ended) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _ended(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def address_of(bound: socket.socket) -> str:
    """`http://host:port` of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 is any free one.

    Raises:
        ConfigError: it is taken, or not an address of this machine.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = info[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # a name that no host can have, too
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error}): choose another --port, or 0 for any"
        ) from error
    return bound


def serve(
    app: App,
    bound: socket.socket,
    *,
    drain: float,
    listens: Callable[[str], None],
    reload: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then requests that were let in are answered first.

    Args:
        app: the application.
        bound: where it listens.
        drain: how many seconds these have.
        listens: is called with the address once it answers.
        reload: is called in a thread after SIGHUP.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(drain),
        lifespan="on",
        ws="none",
    )
    _Server(config, listens, reload).run([bound])


def log_requests() -> None:
    """Write the request lines to stderr, one JSON object a line and nothing before it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("vqguard.recipes.serving.door.request_log")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
