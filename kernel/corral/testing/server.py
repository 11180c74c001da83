"""A real `corral serve` in a separate process, for tests that measure, interrupt or kill the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx2
import msgspec

from corral.config.model import Config

if TYPE_CHECKING:
    from corral.cli.asgi_servers import Shutdown
    from corral.testing.kit import Kit

EMAIL, PASSWORD = "admin@example.org", "correct horse battery staple"
_SHARES, _SHARE = 8, 1_596
_numbers = itertools.count(secrets.randbelow(_SHARE))


@contextlib.asynccontextmanager
async def serving_app(app: Any, config: Config, server: str) -> AsyncIterator[tuple[int, Shutdown]]:
    """Serve an ASGI application in this process in the same way as `corral serve`.

    Yield the port and the object that shuts the server down.
    """
    from corral.cli.asgi_servers import Shutdown, serve_with
    from corral.cli.listener import listen

    config = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, server=server))
    listener, ending = listen("127.0.0.1:0"), Shutdown()
    running = asyncio.create_task(serve_with(config, app, os.dup(listener.fileno()), ending))
    try:
        yield listener.getsockname()[1], ending
    finally:
        ending.close(ending.seconds)
        await running
        listener.close()


@contextlib.asynccontextmanager
async def serving(kit: Kit, server: str = "uvicorn") -> AsyncIterator[int]:
    """Serve the kit's kernel on a free port with `uvicorn` or `hypercorn`, and yield the port."""
    async with serving_app(kit.application.app, kit.kernel.config, server) as (port, _):
        yield port


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return the TLS context that all HTTP clients share, so that the system's certificates are read only once."""
    return ssl.create_default_context()


def start_process(arguments: Sequence[str], *, environ: Mapping[str, str], folder: Path, log: Path) -> Any:
    """Start `corral` with these arguments in a new session, and append its output to the log."""
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603  (our own program)
            [sys.executable, "-m", "corral", *arguments],
            env=dict(environ),
            cwd=folder,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


class ServerProcess:
    """A `corral serve` process on a free port, to be used as `with ServerProcess(folder) as server:`.

    `kill()` sends SIGKILL; `start()` then starts the server again on the same port. `EMAIL` and `PASSWORD` are the
    credentials of an admin. `arguments` are additional arguments of `corral serve`. `environ` contains additional
    environment variables.
    """

    def __init__(
        self,
        folder: Path,
        *,
        database_url: str | None = None,
        arguments: tuple[str, ...] = ("--no-embedded-worker",),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.arguments = folder, arguments
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_ms: list[int] = []
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self.environ.update(
            CORRAL_CONFIG=os.devnull,
            CORRAL_DATA_DIR=str(folder / "data"),
            CORRAL_RATE_LIMITS="off",
            CORRAL_BOOTSTRAP_ADMIN_EMAIL=EMAIL,
            CORRAL_BOOTSTRAP_ADMIN_PASSWORD=PASSWORD,
            **({"CORRAL_DATABASE_URL": database_url} if database_url else {}),
        )
        self.environ.update(environ or {})

    @property
    def log(self) -> str:
        """The output that the server wrote to standard output and standard error."""
        return (self.folder / "server.log").read_text("utf-8", "replace")

    def wait_for_log(self, text: str, *, seconds: float = 60.0) -> str:
        """Wait until the log contains this text, and return the log.

        A server may answer requests before it has printed that it is ready.
        """
        until = time.monotonic() + seconds
        while text not in (log := self.log):
            if time.monotonic() > until:
                raise RuntimeError(f"the log did not contain {text!r} within {seconds:g} seconds\n{log[-4000:]}")
            time.sleep(0.02)
        return log

    def start(self, *, seconds: float = 120.0) -> Self:
        """Start the server and wait until it is ready. The startup time is appended to `ready_ms`, in milliseconds.

        Raise `RuntimeError` if the server exits, or is not ready within `seconds` seconds.
        """
        began = time.monotonic()
        command = ["serve", "--bind", f"127.0.0.1:{self.port}", *self.arguments]
        self.process = start_process(command, environ=self.environ, folder=self.folder, log=self.folder / "server.log")
        assert self.process is not None
        with httpx2.Client(base_url=self.address, timeout=2, trust_env=False, verify=_tls_context()) as client:
            while time.monotonic() - began < seconds:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server exited with status {self.process.returncode}\n{self.log[-4000:]}")
                with contextlib.suppress(httpx2.HTTPError):
                    if client.get("/health/ready").status_code == 200:
                        self.ready_ms.append(round((time.monotonic() - began) * 1000))
                        return self
                time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"the server was not ready within {seconds:g} s\n{self.log[-4000:]}")

    def kill(self) -> None:
        """Kill the server and all processes in its process group with SIGKILL."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._wait_for_port()

    def _wait_for_port(self) -> None:
        """Wait until all processes of the server have released the port, so that the server can use it again."""
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))
                return
            time.sleep(0.02)

    def stop(self, *, seconds: float = 120.0) -> int:
        """Send SIGTERM, wait up to `seconds` seconds for the server to exit, and return its exit status."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(seconds)
        self.kill()
        return status

    def client(self, token: str | None = None) -> httpx2.Client:
        """Return an HTTP client whose base URL is `/api/v1` on this server."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        address = f"{self.address}/api/v1"
        return httpx2.Client(base_url=address, timeout=30, trust_env=False, headers=headers, verify=_tls_context())

    def sign_in(self, email: str = EMAIL, password: str = PASSWORD) -> httpx2.Client:
        """Sign in with email and password, and return a client with the new access token.

        Requests that are answered with the status 503, as may happen on a busy machine, are retried for up to a minute.
        """
        until = time.monotonic() + 60
        with self.client() as client:
            while True:
                answer = client.post("/auth/login", json={"email": email, "password": password})
                if answer.status_code != 503 or time.monotonic() > until:
                    break
                time.sleep(0.5)
        answer.raise_for_status()
        return self.client(str(answer.json()["access_token"]))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.kill()


class JobsProcess:
    """A `corral jobs` process that runs the jobs of an installation. `folder` contains its log."""

    def __init__(self, environ: Mapping[str, str], folder: Path, *, arguments: tuple[str, ...] = ()) -> None:
        self.environ, self.folder, self.arguments = environ, folder, arguments
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> str:
        """The output that the process wrote to standard output and standard error."""
        return (self.folder / "jobs.log").read_text("utf-8", "replace")

    def start(self, *, seconds: float = 120.0) -> Self:
        """Start the process and wait until it runs jobs.

        Raise `RuntimeError` if the process exits, or does not run jobs within `seconds` seconds.
        """
        until = time.monotonic() + seconds
        log = self.folder / "jobs.log"
        log.write_bytes(b"")
        self.process = start_process(["jobs", *self.arguments], environ=self.environ, folder=self.folder, log=log)
        assert self.process is not None
        while "Jobs are running" not in self.log:
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"corral jobs did not start\n{self.log[-4000:]}")
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """Kill the process and its children with SIGKILL."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self, *, seconds: float = 120.0) -> int:
        """Send SIGTERM, wait up to `seconds` seconds for the process to exit, and return its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.kill()


def free_port() -> int:
    """Return a free port outside the range that the system uses for outgoing connections.

    A port in that range could be taken by another connection while a server restarts. The processes of pytest-xdist
    choose from different ports, and no process returns a port twice, so the port stays free until a server listens on
    it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + worker % _SHARES * _SHARE  # outgoing connections take ports from 32,768
    while True:
        port = first + next(_numbers) % _SHARE
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
