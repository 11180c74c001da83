"""The `corral jobs` command, which runs background jobs, schedules and durable consumers without serving the API."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from corral.cli import logging_setup, processes
from corral.cli.data_folder import ensure_data_dir, restrict_new_files
from corral.cli.kernel_start import boot_with_log
from corral.cli.output import config_option
from corral.cli.processes import ProcessEnvironment
from corral.cli.registered_processes import record_load, register_for_reload
from corral.config.reader import load as load_config
from corral.errors import StartupError

if TYPE_CHECKING:
    from corral.jobs.shared_queue import SharedJobQueue
    from corral.kernel import Kernel

log = logging.getLogger("corral.jobs")

DRAIN_SECONDS = 25.0
LOOK_SECONDS = 0.2


@click.command("jobs")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    help="maximum number of concurrent jobs (default: the setting jobs.concurrency)",
)
@config_option
def jobs_command(concurrency: int | None, config_path: Path | None) -> None:
    """Run background jobs, schedules and event consumers, without the API.

    Any number of processes can share the work. On SIGTERM, the process waits up to 25 s for running jobs to finish and
    returns unfinished jobs to the queue; a second SIGTERM ends the process immediately. On SIGHUP, the process stops in
    the same way and then starts again with the current configuration and plugins.
    """
    config = load_config(path=config_path, overrides={"settings.jobs.concurrency": concurrency})
    logging_setup.configure(config.log_level, config.log_format)
    restrict_new_files()
    ensure_data_dir(config)
    environment = ProcessEnvironment.capture()
    kernel = boot_with_log(config, environment)
    reload = RestartOnSighup(config_path, environment)
    signal.signal(signal.SIGHUP, reload)
    register_for_reload(config.data_dir)
    if kernel.queue is None:
        asyncio.run(_run(kernel))
    else:
        JobsProcess(kernel, kernel.queue).run()
    processes.force_exit_later()
    if reload.asked:
        environment.restore()
        os.execv(sys.executable, [sys.executable, "-m", "corral", *sys.argv[1:]])  # noqa: S606  (this program)


class RestartOnSighup:
    """Handles SIGHUP by stopping the process in the same way as SIGTERM.

    The process then executes itself again with the same pid. If the configuration is invalid, the process keeps running
    unchanged.
    """

    def __init__(self, config_path: Path | None, environment: ProcessEnvironment) -> None:
        self._config_path, self._environment = config_path, environment
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._environment.restore()
        try:
            load_config(path=self._config_path)
        except StartupError as refused:
            log.error("reload failed; jobs continue with the old configuration", extra={"reason": str(refused)})
            record_load(str(refused))
        else:
            log.info("reloading")
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


async def _run(kernel: Kernel) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stopping)
    await _start(kernel)
    await stopping.wait()
    await _drain_and_stop(kernel)


def _on_signal(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        os._exit(130)
    stopping.set()


async def _start(kernel: Kernel) -> None:
    await kernel.start(jobs=True, share=True)
    click.echo(f"Jobs are running ({len(kernel.active)} plugins).")


async def _drain_and_stop(kernel: Kernel) -> None:
    await kernel.drain(DRAIN_SECONDS)
    await kernel.stop()


class JobsProcess:
    """Runs the jobs whose ids a shared queue delivers. The kernel's event loop runs in a second thread.

    The main thread, which receives the signals, reads job ids from the queue and passes them to the kernel. It stops
    reading ids while the kernel is running its maximum number of jobs.
    """

    def __init__(self, kernel: Kernel, queue: SharedJobQueue) -> None:
        self._kernel, self._queue = kernel, queue
        self._loop = asyncio.new_event_loop()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Run jobs until SIGTERM or SIGINT."""
        threading.Thread(target=self._loop.run_forever, name="kernel", daemon=True).start()
        self._run_on_loop(_start(self._kernel)).result()
        self._queue.receive(self._start_job, self._stopping)
        self._run_on_loop(_drain_and_stop(self._kernel)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run_on_loop(self, coroutine: Coroutine[Any, Any, object]) -> concurrent.futures.Future[object]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _start_job(self, identifier: str) -> None:
        taking = self._run_on_loop(self._kernel.runner.start_job(identifier))
        while not self._stopping.is_set():
            with contextlib.suppress(concurrent.futures.TimeoutError):
                taking.result(LOOK_SECONDS)
                return
        taking.cancel()
