"""`corral serve`: API, sockets, jobs, schedules and the embedded worker in one process."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import signal
import socket
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import click

from corral.cli import logs
from corral.config import Config
from corral.config_reader import ensure_data_dir
from corral.config_reader import load as load_config

log = logging.getLogger("corral.serve")

DRAIN_SECONDS = 25.0
WORKER_SECONDS = 12.0
CLOSING_SECONDS = 0.5  # busy connections end with their next answer, before the idle ones are closed
HEADER_LIMIT = 16 * 1024
MESSAGE_LIMIT = 64 * 1024
PING_SECONDS = (
    5.0  # Hypercorn keeps the task of a closed socket until its next ping: a long interval delays the shutdown
)


@click.command("serve")
@click.option("--bind", help="host:port to listen on (default 127.0.0.1:8000; port 0: any free one)")
@click.option("--server", type=click.Choice(["hypercorn", "uvicorn", "granian"]), help="the ASGI server")
@click.option("--no-jobs", is_flag=True, help="leave jobs and schedules to `corral jobs`")
@click.option("--no-embedded-worker", is_flag=True, help="start no worker beside the server")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read")
def command(
    bind: str | None, server: str | None, no_jobs: bool, no_embedded_worker: bool, config_path: Path | None
) -> None:
    """Serve the API, `/ws`, jobs, schedules and an embedded worker. SIGTERM drains; a second one ends at once."""
    overrides: dict[str, Any] = {"server.bind": bind, "server.server": server}
    config = load_config(path=config_path, overrides=overrides)
    if no_embedded_worker:
        table = {**config.plugins.tables.get("workers", {}), "embedded": False}
        config = load_config(path=config_path, overrides={**overrides, "plugins.workers": table})
    logs.configure(config.log_level, config.log_format)
    ensure_data_dir(config)
    for warning in config.warnings:
        log.warning(warning)
    serve(config, jobs=not no_jobs)


def serve(config: Config, *, jobs: bool) -> None:
    """Boot and serve until a signal. Raises `Refused` and `Pending`."""
    from corral.asgi.application import Application
    from corral.errors import Refused
    from corral.kernel import boot

    if config.server.server == "uvicorn" and importlib.util.find_spec("uvicorn") is None:
        raise Refused("server.server: uvicorn is an extra: pip install 'corral[fast]'")
    kernel = boot(config)
    application = Application(kernel)
    for warning in kernel.settings.unknown():
        log.warning(warning)
    listener = listen(config.server.bind)
    address = loopback_address(listener, tls=config.server.certfile is not None)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    asyncio.run(_run(kernel, application, listener, address, jobs))


def listen(bind: str) -> socket.socket:
    """The listening socket; `Refused` when the address is taken or not of this machine."""
    from corral.errors import Refused

    split = urllib.parse.urlsplit(f"//{bind}")
    host, port = split.hostname or "127.0.0.1", split.port or 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Refused(f"server.bind: cannot listen on {bind}: {error.strerror}; choose another with --bind") from None
    listener.listen(1024)
    return listener


def loopback_address(listener: socket.socket, *, tls: bool) -> str:
    """Where this process reaches itself."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _run(kernel: Any, application: Any, listener: socket.socket, address: str, jobs: bool) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stopping)
    await kernel.start(jobs=jobs)
    server = asyncio.create_task(
        _serve_with(kernel.config, application.app, listener, stopping_done := asyncio.Event())
    )
    await kernel.serving(address)
    _announce(kernel, address)
    waiting = asyncio.create_task(stopping.wait())
    await asyncio.wait({server, waiting}, return_when=asyncio.FIRST_COMPLETED)
    log.info("draining")
    application.path.drain()
    await kernel.drain(WORKER_SECONDS)
    await asyncio.sleep(CLOSING_SECONDS)
    stopping_done.set()
    try:
        await server
    finally:
        await kernel.stop()
        listener.close()
    log.info("stopped")


def _on_signal(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        os._exit(130)
    stopping.set()


async def _serve_with(config: Config, app: Any, listener: socket.socket, stopping: asyncio.Event) -> None:
    if config.server.server == "uvicorn":
        await _serve_uvicorn(config, app, listener, stopping)
    else:
        await _serve_hypercorn(config, app, listener, stopping)


async def _serve_hypercorn(config: Config, app: Any, listener: socket.socket, stopping: asyncio.Event) -> None:
    from wsgiref.handlers import format_date_time

    from hypercorn.asyncio import serve as hypercorn_serve
    from hypercorn.config import Config as HypercornConfig

    class Settings(HypercornConfig):
        made = (0, [(b"date", b"")])

        def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
            """`Date` alone, made once a second: stock Hypercorn formats it for each answer."""
            second = int(time.time())
            if self.made[0] != second:
                self.made = (second, [(b"date", format_date_time(second).encode())])
            return self.made[1]

    settings = Settings()
    settings.bind = [f"fd://{os.dup(listener.fileno())}"]
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


async def _serve_uvicorn(config: Config, app: Any, listener: socket.socket, stopping: asyncio.Event) -> None:
    import uvicorn

    settings = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="wsproto",
        ws_max_size=MESSAGE_LIMIT, ws_ping_interval=20.0, timeout_graceful_shutdown=int(DRAIN_SECONDS),
        h11_max_incomplete_event_size=HEADER_LIMIT,
        ssl_certfile=config.server.certfile, ssl_keyfile=config.server.keyfile,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # ours drain first

    async def end() -> None:
        await stopping.wait()
        server.should_exit = True

    ending = asyncio.create_task(end())
    try:
        await server._serve([listener])
    finally:
        ending.cancel()


def _announce(kernel: Any, address: str) -> None:
    """What an operator wants to know at the start, as text on standard output."""
    config: Config = kernel.config
    lines = [f"Corral is ready: {address}/api/v1/docs", f"  data folder   {config.data_dir}"]
    if config.keys.master_key is None:
        lines.append(f"  master key    {config.data_dir / 'master.key'}  (back this up, apart from the data)")
    if kernel.first_admin_hint:
        lines.append(f"  first admin   {kernel.first_admin_hint}")
    for loaded in kernel.plugins:
        if loaded.state in ("failed", "blocked"):
            lines.append(f"  plugin {loaded.name} is {loaded.state}: {loaded.reason}")
    click.echo("\n".join(lines))
    sys.stdout.flush()
