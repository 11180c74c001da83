"""The servers that the ASGI application runs on."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from corral.cli import idle_timer
from corral.config.model import Config

DRAIN_SECONDS = 25.0
HEADER_LIMIT = 16 * 1024
MESSAGE_LIMIT = 64 * 1024
PING_SECONDS = 20.0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (extra `fast`); None: the standard loop."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


async def serve_with(config: Config, app: Any, accepting: int, stopping: asyncio.Event) -> None:
    """`accepting`: the handle of the listening socket, which the server closes."""
    if config.server.server == "uvicorn":
        await _serve_uvicorn(config, app, accepting, stopping)
    else:
        await _serve_hypercorn(config, app, accepting, stopping)


async def _serve_hypercorn(config: Config, app: Any, accepting: int, stopping: asyncio.Event) -> None:
    from wsgiref.handlers import format_date_time

    from hypercorn.asyncio import serve as hypercorn_serve
    from hypercorn.config import Config as HypercornConfig

    from corral.cli import http2, web_sockets

    class Settings(HypercornConfig):
        made = (0, [(b"date", b"")])

        def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
            """`Date` alone, made once a second: stock Hypercorn formats it for each answer."""
            second = int(time.time())
            if self.made[0] != second:
                self.made = (second, [(b"date", format_date_time(second).encode())])
            return self.made[1]

    idle_timer.install()
    http2.install()
    web_sockets.install()
    settings = Settings()
    settings.bind = [f"fd://{accepting}"]
    settings.accesslog = None
    settings.errorlog = logging.getLogger("hypercorn.error")
    settings.h11_max_incomplete_size = HEADER_LIMIT
    settings.websocket_max_message_size = MESSAGE_LIMIT
    settings.websocket_ping_interval = PING_SECONDS
    settings.graceful_timeout = DRAIN_SECONDS
    settings.shutdown_timeout = DRAIN_SECONDS
    if config.server.certfile is not None and config.server.keyfile is not None:
        settings.certfile, settings.keyfile = str(config.server.certfile), str(config.server.keyfile)
    await hypercorn_serve(app, settings, shutdown_trigger=stopping.wait)


async def _serve_uvicorn(config: Config, app: Any, accepting: int, stopping: asyncio.Event) -> None:
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="wsproto",
        proxy_headers=False,
        ws_max_size=MESSAGE_LIMIT,
        ws_per_message_deflate=False,
        ws_ping_interval=PING_SECONDS,
        timeout_graceful_shutdown=int(DRAIN_SECONDS),
        h11_max_incomplete_event_size=HEADER_LIMIT,
        ssl_certfile=config.server.certfile,
        ssl_keyfile=config.server.keyfile,
    )
    server = uvicorn.Server(settings)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # ours drain first

    async def end() -> None:
        await stopping.wait()
        server.should_exit = True

    ending = asyncio.create_task(end())
    try:
        await server._serve([socket.socket(fileno=accepting)])
    finally:
        ending.cancel()
