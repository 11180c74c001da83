"""`corral demo`: a whole installation in a temporary data folder, with one task from start to result."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click

from corral.cli.demo_client import DemoClient, Failed

EMAIL = "admin@demo.invalid"
READY_SECONDS, TASK_SECONDS, END_SECONDS = 30.0, 120.0, 15.0
LOG_TAIL = 15


class Interrupted(BaseException):
    """SIGTERM or SIGINT: end the whole process tree."""


class Screen:
    """A line a step with the elapsed time, or nothing but the final JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json, self.began = as_json, time.monotonic()
        self.steps: list[dict[str, Any]] = []

    def step(self, name: str, text: str) -> None:
        """Something happened."""
        elapsed = time.monotonic() - self.began
        self.steps.append({"step": name, "detail": text, "elapsed_ms": round(elapsed * 1000)})
        if not self.as_json:
            click.echo(f"{click.style(f'{elapsed:6.2f} s', dim=True)}  {click.style(f'{name:<10}', bold=True)} {text}")

    def end(self, outcome: dict[str, Any]) -> None:
        """The task has ended."""
        if self.as_json:
            click.echo(json.dumps({**outcome, "steps": self.steps}, indent=2))
            return
        if outcome["model"].startswith("scripted/"):
            click.echo(f"\n{outcome['model']} only repeats what it was asked; a real model gives real answers.")
        colour = "green" if outcome["status"] == "completed" else "red"
        click.echo(f"\n{click.style(outcome['status'], fg=colour, bold=True)}\n\n{outcome['result']}\n")
        for name in ("input_tokens", "output_tokens", "cost_usd", "duration_ms"):
            click.echo(f"  {name.replace('_', ' '):<15} {outcome[name]}")


@click.command("demo")
@click.option("--once", is_flag=True, help="end after the task instead of staying up")
@click.option(
    "--input", "input_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="a text of yours"
)
@click.option("--require-model", is_flag=True, help="fail when no local model is installed")
@click.option("--port", type=click.IntRange(1, 65535), help="default: 8000 if free, else any free one")
@click.option("--keep", type=click.Path(path_type=Path), help="a new data folder that is not deleted at the end")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def command(
    once: bool, input_path: Path | None, require_model: bool, port: int | None, keep: Path | None, as_json: bool
) -> None:
    """A whole installation in a temporary folder: server, worker, agent, and one task from start to result.

    It touches no existing data folder. Exits with 0 only when the task is completed.
    """
    if require_model:
        raise click.ClickException(
            "no local model is installed: it comes with the plugin corral-llama; without --require-model the demo "
            "runs with scripted/echo"
        )
    if keep is not None and keep.exists():
        raise click.UsageError(f"--keep {keep}: the folder exists; name a new one")
    text = _input(input_path)
    if len(text.encode()) > 60_000:
        raise click.UsageError(f"the input has {len(text.encode())} bytes, at most 60000 are taken")
    screen = Screen(as_json=as_json)
    with _signals(), _folder(keep) as folder:
        try:
            completed = _run(screen, folder, port or _free_port(), text, once=once)
        except Interrupted:
            click.echo("interrupted", err=True)
            sys.exit(130)
    sys.exit(0 if completed else 1)


def _run(screen: Screen, folder: Path, port: int, text: str, *, once: bool) -> bool:
    password = secrets.token_urlsafe(12)
    address = f"http://127.0.0.1:{port}"
    log_path = folder / "server.log"
    with _server(folder, port, password, log_path) as server:
        client = DemoClient(address)
        try:
            client.wait_until_ready(server, READY_SECONDS)
            screen.step("server", f"{address}  (API at {address}/api/v1/docs)")
            client.sign_in(EMAIL, password)
            screen.step("admin", f"{EMAIL}  password {password}")
            outcome = client.run_task(text, screen.step, TASK_SECONDS)
        except Failed as failure:
            click.echo(f"corral demo: {failure}\n{_tail(log_path)}", err=True)
            return False
        screen.end(outcome)
        if not once and outcome["status"] == "completed":
            if not screen.as_json:
                click.echo("\nThe installation stays up until Ctrl-C.")
            with contextlib.suppress(Interrupted):  # Ctrl-C is how it is meant to end
                server.wait()
        return bool(outcome["status"] == "completed")


@contextlib.contextmanager
def _server(folder: Path, port: int, password: str, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a session of its own, so that the whole tree can be ended."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    environment.update(
        CORRAL_CONFIG=os.devnull,
        CORRAL_DATA_DIR=str(folder / "data"),
        CORRAL_BOOTSTRAP_ADMIN_EMAIL=EMAIL,
        CORRAL_BOOTSTRAP_ADMIN_PASSWORD=password,
        PYTHONUNBUFFERED="1",
    )
    command = [sys.executable, "-m", "corral", "serve", "--bind", f"127.0.0.1:{port}"]
    with log_path.open("wb") as log_file:
        server = subprocess.Popen(  # noqa: S603  (our own program)
            command, env=environment, cwd=folder, stdout=log_file, stderr=log_file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield server
        finally:
            _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    folder = keep if keep is not None else Path(tempfile.mkdtemp(prefix="corral-demo-"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield folder.absolute()
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    for port in (8000, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found: int = probe.getsockname()[1]
            return found
    raise click.ClickException("no free port on 127.0.0.1")


def _input(path: Path | None) -> str:
    if path is None:
        return resources.files("corral.cli").joinpath("demo.txt").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"--input {path}: the file is not UTF-8 text") from None


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL:])
    return ""
