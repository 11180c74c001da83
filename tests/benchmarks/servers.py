"""Servers under measurement: processes pinned to one core, and the load that runs beside them on the other."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from tests.kernel.cli.warm import warm

from corral.testing.server import free_port

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
CONNECTIONS = 32
EMAIL, PASSWORD = "bench@example.org", "correct horse battery staple"


class Broken(Exception):
    """A server did not start, or answered what was not expected."""


class Server:
    """A process that serves on `port`. With `forks`, it is a fork of a process that has imported Corral."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        environ: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
        core: int = SERVER_CORE,
        forks: bool = False,
    ) -> None:
        self.port = port
        self.log = log
        self.began = time.perf_counter()
        if forks:
            assert log is not None
            inherited = {**os.environ, **(environ or {})}
            self.process: Any = warm().start(command[3:], cwd=cwd or Path.cwd(), environ=inherited, log=log)
            os.sched_setaffinity(self.process.pid, {core})
            return
        with open(log or os.devnull, "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                cwd=cwd,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )

    def wait_for(self, path: str, seconds: float = 60.0) -> float:
        """Ask until the answer is 2xx; seconds since the process was started."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if self.process.poll() is not None:
                raise Broken(f"the server ended with {self.process.returncode}: {self.said()}")
            with contextlib.suppress(OSError):
                if self.call("GET", path)[0] // 100 == 2:
                    return time.perf_counter() - self.began
            time.sleep(0.005)
        raise Broken(f"{path} did not answer 2xx in {seconds:g} s: {self.said()}")

    def said(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:] if self.log else ""

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        """One request on a connection of its own: status and parsed body."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request_bytes(method, path, body, token, close=True))
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        if not head:
            raise ConnectionError("no answer")
        return int(head[9:12]), json.loads(content) if content else None

    def must(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        """`call`, where any status but 2xx is `Broken`."""
        status, answer = self.call(method, path, body, token)
        if status // 100 != 2:
            raise Broken(f"{method} {path} -> {status} {answer}")
        return answer

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def waited_seconds(self) -> float:
        """How long its main thread had work, and no core because others had it. Only Linux tells; else 0."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.process.pid}/schedstat").read_text("ascii").split()[1]) / 1e9
        return 0.0

    def rss_mb(self) -> float:
        """Resident memory of the process and its children."""
        process = psutil.Process(self.process.pid)
        used: int = sum(item.memory_info().rss for item in (process, *process.children(recursive=True)))
        return used / 2**20

    def stop(self) -> None:
        """Terminate and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


LONGEST_WINDOW = 10.0  # seconds


class Load:
    """Figures of one load; `cpu_us` is the CPU time of the server a request."""

    def __init__(self, result: Mapping[str, Any], cpu_seconds: float) -> None:
        self.cpu_us = cpu_seconds / result["count"] * 1e6 or 1.0
        self.count: int = result["count"]
        self.seconds: float = result["seconds"]
        self.per_second: float = result["per_second"]
        self.least_ms: float = result["least_ms"]
        self.p50_ms: float = result["p50_ms"]
        self.p99_ms: float = result["p99_ms"]


def request_bytes(method: str, path: str, body: Any = None, token: str | None = None, *, close: bool = False) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    content = b"" if body is None else json.dumps(body).encode()
    if content:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + content


def load(
    server: Server,
    requests: Sequence[bytes],
    *,
    seconds: float | None = None,
    count: int | None = None,
    connections: int = CONNECTIONS,
    accept: Sequence[int] = (200,),
    strict: bool = True,
) -> Load:
    """Send the requests in turn for `seconds`, or until `count` are answered, and at least until one is answered.

    Raise `Broken` for an answer that is not in `accept`; unless `strict`, such an answer does not count.
    """
    job = {
        "port": server.port,
        "connections": connections,
        "accept": list(accept),
        "requests": [base64.b64encode(item).decode() for item in requests],
        **({"seconds": seconds} if seconds is not None else {"count": count}),
    }
    cpu = server.cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-IS", str(HERE / "load.py")],  # it needs the standard library alone
        input=json.dumps(job).encode(),
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
    )
    result = json.loads(done.stdout)
    if seconds is not None and seconds < LONGEST_WINDOW and not result["count"] and not result["unexpected"]:
        # On a busy machine a short window may end before its first answer.
        return load(server, requests, seconds=4 * seconds, connections=connections, accept=accept, strict=strict)
    if strict and result["unexpected"]:
        raise Broken(
            f"{result['unexpected']} answers were not expected, beside {result['count']}; the first: {result['sample']}"
        )
    return Load(result, server.cpu_seconds() - cpu)


def hello() -> contextlib.AbstractContextManager[Server]:
    """The reference server."""
    return _reference("reference_hello.py")


def write_reference(database: Path) -> contextlib.AbstractContextManager[Server]:
    """The reference server of writes, into this file of the product."""
    return _reference("reference_write.py", str(database))


def sockets_reference() -> contextlib.AbstractContextManager[Server]:
    """The reference server of sockets."""
    return _reference("reference_sockets.py")


@contextlib.contextmanager
def _reference(script: str, *arguments: str) -> Iterator[Server]:
    port = free_port()
    server = Server([sys.executable, str(HERE / script), str(port), *arguments], port)
    try:
        server.wait_for("/hello")
        yield server
    finally:
        server.stop()


def start_corral(folder: Path, *options: str, environ: Mapping[str, str] | None = None, forks: bool = False) -> Server:
    """`corral serve` on the data folder `folder/data`, with `folder/corral.toml` if there is one. Not waited for."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    toml = folder / "corral.toml"
    command = [sys.executable, "-m", "corral", "serve", "--bind", f"127.0.0.1:{port}", *options]
    if toml.exists():
        command += ["--config", str(toml)]
    settings = {
        "CORRAL_DATA_DIR": str(folder / "data"),
        "CORRAL_RATE_LIMITS": "false",
        "CORRAL_LOG_LEVEL": "warning",
        "CORRAL_BOOTSTRAP_ADMIN_EMAIL": EMAIL,
        "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": PASSWORD,
        "CORRAL_REGISTRATION": "open",
        **(environ or {}),
    }
    return Server(command, port, environ=settings, log=folder / "serve.log", forks=forks)


@contextlib.contextmanager
def corral(folder: Path, *options: str, forks: bool = False) -> Iterator[Server]:
    """`start_corral`, ready, and stopped at the end; without the embedded worker, which would do the tasks created."""
    server = start_corral(folder, "--no-embedded-worker", *options, forks=forks)
    try:
        server.wait_for("/health/ready")
        yield server
    finally:
        server.stop()


def sign_in(server: Server) -> str:
    """An access token of the first admin."""
    answer = server.must("POST", "/api/v1/auth/login", {"email": EMAIL, "password": PASSWORD})
    token: str = answer["access_token"]
    return token
