"""A kernel with SSH connections, and machines: SSH servers of asyncssh, or of OpenSSH where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal as signals
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from corral.testing.kit import Client, Kit
from corral.testing.server import free_port
from corral_plugins.ssh.service.host_keys import fingerprint_of

PLUGINS = ("audit", "settings", "secrets", "circuit_breakers", "ssh")
USER, PASSWORD = "deploy", "tR0ub4dor-and-3-horses"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


class _Gate(asyncssh.SSHServer):
    """Lets in who knows the password or has the key, and keeps a record of every try."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def connection_made(self, conn: Any) -> None:
        self._machine.connections += 1

    def begin_auth(self, username: str) -> bool:
        self._machine.logins.append(username)
        return True

    def session_requested(self) -> Any:
        return _Shell(self._machine)

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, self._machine.password)

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: Any) -> bool:
        line = " ".join(key.export_public_key().decode().split()[:2])
        return username == USER and line in self._machine.authorized


class _Shell(asyncssh.SSHServerSession[bytes]):
    """Runs one command in a process group of its own, as sshd does."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._input = machine, b""
        self._child: asyncio.subprocess.Process | None = None
        self._early_signals: list[str] = []  # that arrived before the command was started
        self._closed, self._writable = asyncio.Event(), asyncio.Event()
        self._writable.set()

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def exec_requested(self, command: str) -> bool:
        self._command = command
        return True

    def session_started(self) -> None:
        self._machine.tasks.append(asyncio.ensure_future(self._run()))

    def data_received(self, data: bytes, datatype: Any) -> None:
        self._input += data

    def eof_received(self) -> bool:
        self._closed.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def signal_received(self, signal: str) -> None:
        if self._child is None:
            self._early_signals.append(signal)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, getattr(signals, f"SIG{signal}"))

    async def _run(self) -> None:
        child = self._child = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", self._command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **{key: str(value) for key, value in self._channel.get_environment().items()}},
        )
        self._machine.processes.append(child)
        for signal in self._early_signals:
            self.signal_received(signal)
        await self._closed.wait()
        assert child.stdin is not None
        child.stdin.write(self._input)
        child.stdin.close()
        await asyncio.gather(self._copy(child.stdout, None), self._copy(child.stderr, asyncssh.EXTENDED_DATA_STDERR))
        code = await child.wait()
        with contextlib.suppress(OSError):
            if code < 0:
                self._channel.exit_with_signal(signals.Signals(-code).name.removeprefix("SIG"))
            else:
                self._channel.exit(code)

    async def _copy(self, source: Any, datatype: Any) -> None:
        while chunk := await source.read(65_536):
            with contextlib.suppress(OSError):
                self._channel.write(chunk, datatype)
            await self._writable.wait()


class Machine:
    """A machine with an SSH server of asyncssh, which runs commands in process groups as sshd does."""

    def __init__(self, password: str = PASSWORD) -> None:
        self.password = password
        self.connections = 0
        self.logins: list[str] = []
        self.authorized: set[str] = set()
        self.processes: list[asyncio.subprocess.Process] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.port = 0
        self._server: Any = None

    async def start(self, key: Any = None, banner: str | None = None) -> None:
        """Listen, on the same port again if it was started before."""
        self.key = key or asyncssh.generate_private_key("ssh-ed25519")
        self._server = await asyncssh.create_server(
            lambda: _Gate(self),
            "127.0.0.1",
            self.port,
            server_host_keys=[self.key],
            encoding=None,
            reuse_address=True,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the server and every connection."""
        self._server.close()
        await self._server.wait_closed()

    async def renew_key(self) -> None:
        """The machine comes back with another host key."""
        await self.stop()
        await self.start()

    @property
    def key_line(self) -> str:
        return " ".join(self.key.export_public_key().decode().split()[:2])

    @property
    def fingerprint(self) -> str:
        return str(fingerprint_of(self.key_line))

    def living(self) -> list[int]:
        """The processes of commands that have not ended."""
        return [each.pid for each in self.processes if each.returncode is None]


class Fleet:
    """Connections as an admin has them."""

    kit: Kit
    admin: Client

    async def build(self, kit: Kit, machine: Machine) -> Fleet:
        self.kit, self.machine, self._n = kit, machine, 0
        self.admin = await kit.as_user("admin")
        return self

    async def create(self, **fields: Any) -> Any:
        """A connection to the machine with its password; the answer's body."""
        self._n += 1
        password = {"auth_method": "password", "password": PASSWORD}
        body = {
            "name": f"machine-{self._n}",
            "hostname": "127.0.0.1",
            "port": self.machine.port,
            "username": USER,
            **({} if "private_key" in fields else password),
            **fields,
        }
        answer = await self.admin.post("/ssh-connections", body)
        assert answer.status == 201, answer
        return answer.json()

    async def trusted(self, **fields: Any) -> str:
        """A connection whose host key is known in advance; its id."""
        made = await self.create(host_key_policy="strict", host_key=self.machine.key_line, **fields)
        return str(made["id"])

    async def post(self, path: str, body: Any = None) -> Any:
        return await self.admin.post(f"/ssh-connections/{path}", body)

    async def run(self, connection: str, command: str, **fields: Any) -> Any:
        """Run a command; the answer."""
        return await self.post(f"{connection}/execute", {"command": command, **fields})

    async def executions(self, connection: str) -> list[Any]:
        """The commands that were run, newest first."""
        answer = await self.admin.get(f"/ssh-connections/{connection}/executions")
        assert answer.status == 200, answer
        return list(answer.json()["items"])

    async def finished_on(self) -> list[str]:
        """The names of the connections in the audit rows of ended commands."""
        rows = (await self.admin.get("/admin/audit?action=ssh.command.finish")).json()["items"]
        return [row["object"]["name"] for row in rows]


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    made = Machine()
    await made.start()
    yield made
    await made.stop()
    for each in made.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signals.SIGKILL)
    for task in made.tasks:
        task.cancel()


@pytest.fixture
async def fleet(make_kit: Callable[..., Any], machine: Machine) -> Fleet:
    """Allow machines on this computer."""
    kit = await make_kit(plugins=PLUGINS, config={"egress.allow": ["127.0.0.1"]})
    return await Fleet().build(kit, machine)


@pytest.fixture
def sshd(tmp_path: Path) -> Any:
    """OpenSSH's own server for the user who runs the tests, and the private key that it lets in."""
    if not Path(SSHD).exists():
        pytest.skip("OpenSSH's sshd is not installed here; the tests with the server of asyncssh cover the rules.")
    port = free_port()
    host, user = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    host.write_private_key(tmp_path / "host_key")
    user.write_public_key(tmp_path / "authorized_keys")
    for name in ("host_key", "authorized_keys"):
        (tmp_path / name).chmod(0o600)
    Path("/run/sshd").mkdir(exist_ok=True)  # the folder that the server of Debian wants
    settings = {
        "HostKey": tmp_path / "host_key",
        "AuthorizedKeysFile": tmp_path / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "AcceptEnv": "GREETING",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    command = [SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config"), "-p", str(port), "-o", "ListenAddress=127.0.0.1"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield {"port": port, "host_key": host, "private_key": user.export_private_key().decode()}
    finally:
        server.terminate()
        server.wait(10)
