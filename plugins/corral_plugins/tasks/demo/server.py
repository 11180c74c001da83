"""The demo's own server: a process tree that ends with the demo, and its data folder, which is temporary by default."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click

EMAIL = "admin@demo.invalid"
END_SECONDS = 15.0
LOG_TAIL = 15

_READY = re.compile(r"ready on \w+: (http://\S+?)/api/v1")


class Interrupted(BaseException):
    """Raised on SIGTERM, SIGINT or SIGHUP to stop the demo's whole process tree."""


class InterruptHandler:
    """Converts SIGTERM, SIGINT and SIGHUP into one `Interrupted` exception.

    If `nohup` has disabled SIGHUP, the signal stays ignored. Signals that arrive between `defer_signals` and
    `raise_deferred` are deferred, so that they cannot interrupt a cleanup or the creation of a resource whose cleanup
    is not registered yet.
    """

    def __init__(self) -> None:
        self._held = self._asked = False

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals inside the `with` block, and restore the previous handlers afterwards.

        Outside the main thread, this method does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def defer_signals(self) -> None:
        """Defer signals until `raise_deferred` is called."""
        self._held = True

    def raise_deferred(self) -> None:
        """Stop deferring signals. Raise `Interrupted` if a signal was deferred."""
        self._held = False
        if self._asked:
            raise Interrupted

    def _on_signal(self, *_: object) -> None:
        asked, self._asked = self._asked, True
        if not self._held and not asked:
            raise Interrupted


@contextlib.contextmanager
def run_server(
    signals: InterruptHandler, folder: Path, config: Path, port: int, password: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in its own session inside the `with` block, then stop all of its processes.

    The server writes its output to `server_log_path(folder)`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    environment.update(
        CORRAL_CONFIG=str(config),
        CORRAL_DATA_DIR=str(folder / "data"),
        CORRAL_BOOTSTRAP_ADMIN_EMAIL=EMAIL,
        CORRAL_BOOTSTRAP_ADMIN_PASSWORD=password,
        PYTHONUNBUFFERED="1",
    )
    command = [sys.executable, "-m", "corral", "serve", "--bind", f"127.0.0.1:{port}"]
    with server_log_path(folder).open("wb") as log_file:
        signals.defer_signals()
        process = subprocess.Popen(  # noqa: S603  (our own program)
            command,
            env=environment,
            cwd=folder,
            stdout=log_file,
            stderr=log_file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            signals.raise_deferred()
            yield process
        finally:
            signals.defer_signals()
            _stop_process(process)


def _stop_process(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def demo_folder(signals: InterruptHandler, keep: Path | None) -> Iterator[Path]:
    """Create the folder `keep` if it is given, otherwise a temporary folder that is deleted at the end of the block."""
    signals.defer_signals()
    folder = keep if keep is not None else Path(tempfile.mkdtemp(prefix="corral-demo-"))
    try:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"the folder {folder} cannot be created: {error.strerror}") from None
        signals.raise_deferred()
        yield folder.absolute()
    finally:
        signals.defer_signals()
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def default_port() -> int:
    """Return 8000 if this port is free, else 0, so that the system chooses a free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 8000))
            return 8000
    return 0


def wait_for_address(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> str | None:
    """Wait until the server logs that it is ready, and return the address from that log line.

    Return None if the process exits or is not ready within `seconds`.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            found = _READY.search(server_log_path(folder).read_text("utf-8", "replace"))
            if found is not None:
                return found.group(1)
        time.sleep(0.05)
    return None


def server_log_path(folder: Path) -> Path:
    """Return the path of the server's log file."""
    return folder / "server.log"


def log_tail(folder: Path) -> str:
    """Return the last 15 lines of the server's log."""
    with contextlib.suppress(OSError):
        return "\n".join(server_log_path(folder).read_text("utf-8", "replace").splitlines()[-LOG_TAIL:])
    return ""
