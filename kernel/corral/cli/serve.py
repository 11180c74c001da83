"""The `corral serve` command, which starts the server in one or more processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from corral.cli import logging_setup, processes
from corral.cli.asgi_servers import Shutdown, chosen_server, loop_factory, serve_with
from corral.cli.data_folder import ensure_data_dir, restrict_new_files
from corral.cli.disk_reserve import DiskReserve
from corral.cli.hidden_packages import hide_packages
from corral.cli.listener import listen, listener_url, loopback_url, refuse_connections
from corral.cli.output import config_option
from corral.cli.processes import ParentConnection, ParentProcess, ProcessEnvironment
from corral.cli.registered_processes import register_for_reload
from corral.cli.start_history import StartHistory
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.errors import StartupError
from corral.plugin import FirstAccount

log = logging.getLogger("corral.serve")

POSTGRES_DRIVERS = ("psycopg", "psycopg2", "psycopg2cffi")
SAFE_MODE = "CORRAL_SAFE_MODE"
SLOW_AT_START_MS = 500
STOP_SECONDS = 2.0  # of `END_SECONDS`, for the plugins and the database, when the requests have ended
CLOSING_SECONDS = 1.5  # busy connections close after their next response, before idle connections are closed


@click.command("serve")
@click.option("--bind", help="host:port to listen on (default 127.0.0.1:8000; port 0 selects a free port)")
@click.option(
    "--server",
    type=click.Choice(["auto", "hypercorn", "uvicorn"]),
    help="ASGI server (default auto, which selects uvicorn if the extra `fast` is installed, and hypercorn otherwise)",
)
@click.option("--processes", type=click.IntRange(1, 256), help="number of server processes (default 1)")
@click.option("--no-jobs", is_flag=True, help="do not run background jobs and schedules; run them with `corral jobs`")
@click.option("--no-embedded-worker", is_flag=True, help="do not start the embedded worker")
@config_option
@click.option("--inherit", hidden=True, help="file descriptors of the listener and of the socket to the parent process")
def serve_command(**options: Any) -> None:
    """Start the server with the API, `/ws`, background jobs, schedules and an embedded worker.

    On SIGTERM, the server answers the open requests and exits; a second SIGTERM ends it immediately. On SIGHUP, it
    reads the configuration again and starts new processes on the same address. When they are ready, the old processes
    exit; if the new processes fail, the old ones keep running.
    """
    config = _read_config(options)
    logging_setup.configure(config.log_level, config.log_format)
    restrict_new_files()
    ensure_data_dir(config)
    if options["inherit"] is not None:
        inherited = ParentConnection(options["inherit"])
        try:
            serve(config, options, inherited, environment=ProcessEnvironment.capture())
        except Exception as error:
            inherited.announce(str(error), ready=False)
            raise
        return
    for warning in config.warnings:
        log.warning(warning)
    reserve = DiskReserve(config.data_dir)
    if reserve.prepare_start():
        log.warning(
            "the disk is full; the server answers reads and refuses writes until there is room",
            extra={"folder": str(config.data_dir)},
        )
    recovering = StartHistory(config.data_dir).is_crash_loop and not config.safe_mode
    if recovering:
        log.error("three starts crashed in a row; starting in safe mode with protected plugins only")
        os.environ[SAFE_MODE] = "1"
        config = _read_config(options)
    environment = ProcessEnvironment.capture()
    if config.server.processes == 1:
        serve(config, options, environment=environment, recovering=recovering)
        reserve.refill()
    else:
        listener, began = listen(config.server.bind), time.time()
        register_for_reload(config.data_dir, listener_url(listener, tls=_has_tls(config)))
        parent = _create_parent(config, options, listener, environment, recovering=recovering, begins=True)
        status = asyncio.run(parent.run())
        if status == 0:  # stopped by a signal, perhaps while processes were starting
            StartHistory(config.data_dir).remove_crashes(began)
            reserve.refill()
        sys.exit(status)


def _has_tls(config: Config) -> bool:
    return config.server.certfile is not None


def _read_config(options: Mapping[str, Any]) -> Config:
    """Read the configuration, with the command-line options as overrides."""
    path = options["config_path"]
    overrides = {f"server.{name}": options[name] for name in ("bind", "server", "processes")}
    config = load_config(path=path, overrides=overrides)
    if options["no_embedded_worker"]:
        table = {**config.plugins.tables.get("workers", {}), "embedded": False}
        config = load_config(path=path, overrides={**overrides, "plugins.workers": table})
    chosen_server(config)  # refuses a server that is not installed
    return config


def _create_parent(
    config: Config,
    options: Mapping[str, Any],
    listener: socket.socket,
    environment: ProcessEnvironment,
    *,
    recovering: bool,
    begins: bool = False,
) -> ParentProcess:
    """Create the parent of the server processes.

    `recovering` is True in safe mode after crashes; a reload then leaves safe mode. `begins` is True if the first call
    to `plan` is part of the server's start, and False if it is part of a reload.
    """
    arguments = ["serve"]
    for name, value in options.items():
        if value not in (None, False):
            arguments += [f"--{name.removesuffix('_path').replace('_', '-')}", *([] if value is True else [str(value)])]

    def plan() -> int:
        nonlocal begins
        environment.restore()
        if recovering and not begins:
            os.environ.pop(SAFE_MODE, None)
        begins = False
        new = _read_config(options)
        if new.server.bind != config.server.bind:
            log.warning(
                f"server.bind is now {new.server.bind}, but the server listens on {config.server.bind} until a restart"
            )
        return new.server.processes

    return ParentProcess(arguments, listener, plan, is_serving=not begins)


def serve(
    config: Config,
    options: Mapping[str, Any],
    inherited: ParentConnection | None = None,
    *,
    environment: ProcessEnvironment,
    recovering: bool = False,
) -> None:
    """Boot a kernel and serve requests until a signal arrives.

    Raise `StartupError` or `MigrationsPending` if the boot fails.
    """
    gc.disable()  # nearly all that a start creates stays, and looking for the rest took a fifth of its time
    with hide_packages(*POSTGRES_DRIVERS if config.database.is_file else ()):  # peewee imports what it finds: 12 MB
        importlib.import_module("peewee")
    from corral.plugins.migrations import MigrationsPending

    starts = StartHistory(config.data_dir)
    starts.begin()
    try:
        _serve(config, options, inherited, starts, environment, recovering=recovering)
        processes.force_exit_later()
    except (StartupError, MigrationsPending, KeyboardInterrupt):
        starts.record_clean_exit()
        raise
    finally:
        gc.enable()


def _serve(
    config: Config,
    options: Mapping[str, Any],
    inherited: ParentConnection | None,
    starts: StartHistory,
    environment: ProcessEnvironment,
    *,
    recovering: bool,
) -> None:
    from corral.asgi.application import Application
    from corral.cli.kernel_start import boot_with_log
    from corral.cli.unknown_settings import unknown_setting_warnings

    kernel = boot_with_log(config, environment, start_secret=b"" if inherited is None else inherited.start_secret)
    application = Application(kernel)
    for warning in unknown_setting_warnings(config, kernel.settings):
        log.warning(warning)
    listener = listen(config.server.bind) if inherited is None else inherited.listener
    gc.freeze()
    gc.enable()
    parent = inherited or _create_parent(config, options, listener, environment, recovering=recovering)

    is_slow_enough = SlowStartFilter()
    logging.getLogger("corral.database").addFilter(is_slow_enough)

    def ready() -> None:
        logging.getLogger("corral.database").removeFilter(is_slow_enough)
        starts.ready()
        DiskReserve(config.data_dir).rewrite_after_start()
        if inherited is None:
            register_for_reload(config.data_dir, listener_url(listener, tls=_has_tls(config)))

    serving = ServingProcess(kernel, application, listener, parent).run(jobs=not options["no_jobs"], ready=ready)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serving)


class SlowStartFilter(logging.Filter):
    """A log filter that suppresses warnings about slow units of work while the server starts.

    Only warnings about units that took less than 500 ms are suppressed. During startup, many units of work run for the
    first time and at the same time, so some are slower than usual.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record should be logged."""
        return record.msg != "slow unit" or getattr(record, "duration_ms", 0) >= SLOW_AT_START_MS


class ServingProcess:
    """The server in this process.

    `parent` determines how the server reloads. With a `ParentProcess`, this process starts the new processes on SIGHUP
    and becomes their parent. With a `ParentConnection`, the existing parent of this process starts them.
    """

    def __init__(
        self, kernel: Any, application: Any, listener: socket.socket, parent: ParentProcess | ParentConnection
    ) -> None:
        self._kernel, self._application, self._listener = kernel, application, listener
        self._parent = parent
        self._accepting = os.dup(listener.fileno())
        self._stopping, self._shutdown = asyncio.Event(), Shutdown()
        self._is_replaced, self._is_signalled = False, False
        self._background_task: asyncio.Task[None] | None = None

    async def run(self, *, jobs: bool, ready: Callable[[], None]) -> None:
        """Serve requests until a signal or a reload, then drain and stop.

        After a reload, a process that became a parent runs until its new processes end.
        """
        self._install_signal_handlers()
        kernel, loop = self._kernel, asyncio.get_running_loop()
        address = loopback_url(listener_url(self._listener, tls=_has_tls(kernel.config)))
        await kernel.start(jobs=jobs)
        server = loop.create_task(serve_with(kernel.config, self._application.app, self._accepting, self._shutdown))
        await kernel.announce_serving(address)
        ready()
        self._announce(announcement(kernel, address, await kernel.container.get(FirstAccount).instructions()))
        waiting = loop.create_task(self._stopping.wait())
        await asyncio.wait({server, waiting}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain_and_stop(server)
        if self._is_replaced and self._background_task is not None:
            await self._background_task

    async def _drain_and_stop(self, server: asyncio.Task[None]) -> None:
        log.info("draining")
        end = time.monotonic() + processes.END_SECONDS - STOP_SECONDS
        if not self._is_replaced:
            processes.force_exit_later(processes.END_SECONDS)
        self._application.pipeline.drain()
        await self._kernel.drain(processes.DRAIN_SECONDS)
        await self._stop_accepting()
        await asyncio.sleep(CLOSING_SECONDS)
        self._shutdown.close(end - time.monotonic())
        try:
            await server
        finally:
            await self._kernel.stop()
        log.info("stopped")

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
            if isinstance(self._parent, ParentProcess):
                signal.signal(number, self._exit_at_second_signal)
        if isinstance(self._parent, ParentProcess):
            loop.add_signal_handler(signal.SIGHUP, self._start_reload, self._parent)
        else:
            loop.add_signal_handler(signal.SIGHUP, lambda: None)

    def _exit_at_second_signal(self, *_: object) -> None:
        """Exit on the second signal.

        This works even if the event loop is blocked, because Python calls this handler outside the loop.
        """
        if self._is_signalled:
            os._exit(130)
        self._is_signalled = True

    def _on_signal(self, number: int) -> None:
        """Stop on the first signal and exit on the second.

        A child process does not exit on the second signal, because its parent kills it. It also ignores SIGINT, because
        a terminal sends Ctrl-C to the parent as well.
        """
        child = isinstance(self._parent, ParentConnection)
        if self._stopping.is_set() and not child:
            os._exit(130)
        if number == signal.SIGTERM or not child:
            self._stopping.set()

    def _announce(self, text: str) -> None:
        if isinstance(self._parent, ParentConnection):
            self._parent.announce(text)
            self._background_task = asyncio.get_running_loop().create_task(self._parent.drain_on_request(self._drain))
        else:
            click.echo(text)
            sys.stdout.flush()

    def _start_reload(self, parent: ParentProcess) -> None:
        if not self._stopping.is_set() and (self._background_task is None or self._background_task.done()):
            self._background_task = asyncio.get_running_loop().create_task(self._reload(parent))

    async def _reload(self, parent: ParentProcess) -> None:
        if await parent.reload():
            self._is_replaced = True
            parent.install_signal_handlers()
            if self._stopping.is_set():  # stopped in the meantime, so stop the new processes too
                parent.stop()
            self._drain()
            await parent.run_until_stopped()

    async def _stop_accepting(self) -> None:
        """Stop accepting connections as soon as this process can drain without accepting more.

        A child process first reports to its parent, and waits until the parent tells all its children to stop
        accepting.
        """
        refusing = self._shutdown.refusing
        if isinstance(self._parent, ParentConnection):
            self._parent.report_drained()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(processes.DRAIN_SECONDS):
                    await refusing.wait()  # until the parent lets no more connections in
            refusing.set()
        elif not self._is_replaced:
            await refuse_connections(self._listener, refusing.set)

    def _drain(self) -> None:
        """Stop accepting connections and begin the shutdown, because other processes now serve the address."""
        self._shutdown.refusing.set()
        self._stopping.set()


def announcement(kernel: Any, address: str, first_account: str | None) -> str:
    """Return the text that the server prints at startup.

    The text contains the address, the data folder, the state of the vault and the plugins that failed. If no account
    exists yet, it also says how to create the first one.
    """
    from corral.cli.kernel_start import sealed_reason

    config: Config = kernel.config
    lines = [f"Corral is ready on {chosen_server(config)}: {address}/api/v1/docs", f"  data folder   {config.data_dir}"]
    if kernel.keyring.sealed:
        lines.append(f"  vault         {sealed_reason(kernel.keyring)}")
    elif config.keys.master_key is None:
        lines.append(f"  master key    {kernel.keyring.source}  (back it up separately from the data)")
    if first_account is not None:
        lines.append(f"  first admin   {first_account}")
    for loaded in kernel.plugins:
        if loaded.state in ("failed", "blocked"):
            lines.append(f"{processes.PLUGIN_LINE}{loaded.name} is {loaded.state}: {loaded.reason}")
    return "\n".join(lines)
