"""Selects the ASGI server, and defines the limits that both uvicorn and Hypercorn enforce (docs/adr/0018)."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

from corral.config.model import Config
from corral.errors import StartupError

HEADER_LIMIT = 16 * 1024  # maximum size of a request head in bytes
KEEP_ALIVE_SECONDS = 5  # idle time without a complete request head
MESSAGE_LIMIT = 64 * 1024  # maximum size of a WebSocket message in bytes
PING_SECONDS = 20.0
PRINTABLE = bytes(byte for byte in range(256) if byte in b"\t" or (byte >= 0x20 and byte != 0x7F))  # in headers


def chosen_server(config: Config) -> Literal["hypercorn", "uvicorn"]:
    """Return the server that `[server] server` selects.

    `auto` selects uvicorn if the `fast` extra is installed, otherwise Hypercorn. Raise `StartupError` if uvicorn is
    configured but not installed.
    """
    if config.server.server == "hypercorn":
        return "hypercorn"
    missing = [name for name in ("uvicorn", "httptools", "uvloop") if importlib.util.find_spec(name) is None]
    if not missing:
        return "uvicorn"
    if config.server.server == "auto":
        return "hypercorn"
    raise StartupError(
        f"server.server is uvicorn, which needs {' and '.join(missing)}: run pip install 'corral[fast]', or set "
        "server.server to auto"
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop factory if uvloop is installed (extra `fast`), or None for the standard loop."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


class Shutdown:
    """The two steps in which an ASGI server shuts down.

    When `refusing` is set, the server stops accepting connections. When `closing` is set, it closes idle connections,
    and stops as soon as all open requests have been answered, or after `seconds` seconds at the latest.
    """

    def __init__(self) -> None:
        self.refusing, self.closing = asyncio.Event(), asyncio.Event()
        self.seconds = 25.0

    def close(self, seconds: float) -> None:
        """Begin both steps of the shutdown. Open requests have `seconds` seconds to finish."""
        self.seconds = seconds
        self.refusing.set()
        self.closing.set()


async def serve_with(config: Config, app: Any, accepting: int, shutdown: Shutdown) -> None:
    """Serve `app` until `shutdown` closes the server.

    `accepting` is the file descriptor of the listening socket; the server closes it.
    """
    if chosen_server(config) == "uvicorn":
        from corral.cli import uvicorn_server

        await uvicorn_server.serve(config, app, accepting, shutdown)
    else:
        from corral.cli import hypercorn_server

        await hypercorn_server.serve(config, app, accepting, shutdown)
