"""Opens an SSH connection, checks the host key, logs in, and runs a command, each with limits on time and size.

The SSH configuration files, agents and known hosts of the Corral server are not used. This module imports asyncssh, so
callers import it only on first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncssh
import msgspec

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy
from corral.egress.resolver import Unresolved
from corral.errors import ExpectedFailure, Invalid, Problem
from corral_plugins.ssh.api import ConnectFailed, LoginFailed, LoginTimeout
from corral_plugins.ssh.service.credentials import Credential

logging.getLogger("asyncssh").setLevel(logging.WARNING)  # at info it logs every command as it is
SINK = "ssh"
MAX_BANNER_BYTES = 8 * 1024
MAX_VERSION_BYTES = 4 * 1024  # the version line, and what follows it in the same packet
KEEPALIVE_SECONDS, KEEPALIVES = 15, 3
STOP_SECONDS = 5.0
CHUNK_BYTES = 64 * 1024
WINDOW_BYTES = 256 * 1024
_threads = ThreadPoolExecutor(16, thread_name_prefix="corral-ssh")
HOST_KEY_ALGORITHMS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
"""The host key algorithms to offer. They exclude certificates and the weak algorithms `ssh-rsa` and `ssh-dss`."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine of a connection: its address, and the user to log in as.

    If `host_key` is None, the connection ends as soon as the machine has presented its host key.
    """

    host: str
    port: int
    username: str
    auth_method: str
    host_key: str | None
    connect_seconds: float
    login_seconds: float


class OtherHostKey(ExpectedFailure):
    """Raised if a machine presented a host key other than the accepted one, or if no key has been accepted.

    No credential was sent to the machine.
    """

    def __init__(self, key_line: str) -> None:
        self.key_line = key_line
        super().__init__("another host key")


class CommandOutput(msgspec.Struct, kw_only=True):
    """The output of a command, and how the command ended.

    `stdout` and `stderr` contain a limited number of bytes. `total` is the total number of bytes read, including
    discarded bytes.
    """

    stdout: bytearray = msgspec.field(default_factory=bytearray)
    stderr: bytearray = msgspec.field(default_factory=bytearray)
    total: int = 0
    exit_code: int | None = None
    signal: str | None = None
    truncated: bool = False
    timed_out: bool = False


class _Client(asyncssh.SSHClient):
    """Checks the host key during the key exchange, and limits how many bytes the machine may send before the login."""

    def __init__(self, host_key: str | None) -> None:
        self._host_key = host_key
        self.key_checked = asyncio.Event()
        self.other_key: str | None = None
        self.is_flooded = False
        self._banner_bytes = 0
        self._conn: asyncssh.SSHClientConnection | None = None

    def abort(self) -> None:
        """Close the connection immediately, if there is one."""
        if self._conn is not None:
            self._conn.abort()

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        """Limit the bytes that the machine sends before its version string.

        This is necessary because asyncssh does not limit their total number.
        """
        receive: Any = conn.data_received

        def receive_limited(data: bytes, datatype: Any = None) -> None:
            if conn.get_extra_info("server_version") is None:
                self._count_bytes(len(data), MAX_BANNER_BYTES + MAX_VERSION_BYTES)
            if not self.is_flooded:
                receive(data, datatype)

        conn.data_received = receive_limited  # type: ignore[method-assign]  # asyncio calls what it finds here
        self._conn = conn

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Return whether the key is the accepted host key. If not, asyncssh ends the connection."""
        line = " ".join(key.export_public_key().decode().split()[:2])
        if line != self._host_key:
            self.other_key = line
        self.key_checked.set()
        return line == self._host_key

    def auth_banner_received(self, msg: str, lang: str) -> None:
        """Count the bytes of a banner that the machine sends during the login, and discard the banner."""
        self._count_bytes(len(msg), MAX_BANNER_BYTES)

    def _count_bytes(self, size: int, limit: int) -> None:
        self._banner_bytes += size
        if self._banner_bytes > limit:
            self.is_flooded = True
            self.abort()


async def connect(egress: Egress, machine: Machine, credential: Credential | None) -> Any:
    """Connect, check the host key, and log in. Return the asyncssh connection.

    The caller must abort the connection after use.

    Raise `OtherHostKey`, `ConnectFailed`, `LoginFailed`, `LoginTimeout`, or `Invalid` (`url_blocked`).
    """
    began = time.monotonic()
    place = f"{machine.host}:{machine.port}"
    sock = await _open_socket(egress, machine)
    client = _Client(machine.host_key)
    opening = asyncio.ensure_future(_log_in(machine, credential, client, sock))
    checked = asyncio.ensure_future(client.key_checked.wait())
    try:
        left = machine.connect_seconds - (time.monotonic() - began)
        await asyncio.wait({opening, checked}, timeout=max(left, 0.1), return_when=asyncio.FIRST_COMPLETED)
        if not opening.done() and not client.key_checked.is_set():
            raise LoginTimeout(f"{place} did not show a host key within {machine.connect_seconds:g} seconds.")
        await asyncio.wait({opening}, timeout=machine.login_seconds)
        if not opening.done():
            raise LoginTimeout(f"{place} did not complete the login within {machine.login_seconds:g} seconds.")
        return _connection_or_error(opening, client, place)
    finally:
        checked.cancel()
        if not opening.done():
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            client.abort()


async def run(
    connection: Any,
    command: str,
    output: CommandOutput,
    *,
    stdin: bytes,
    env: Mapping[str, str],
    seconds: float,
    limit: int,
) -> None:
    """Run a command until it ends, its time limit expires, or one of its output streams exceeds `limit` bytes.

    `output` is filled while the command runs, so that partial output is available if the call is cancelled. If the time
    limit expires, a stream is too long, or the call is cancelled, the command's process group receives TERM, and KILL
    after 5 seconds. Raise `ConnectFailed` if the connection is lost.
    """
    options: dict[str, Any] = {"env": dict(env), "request_pty": False, "x11_forwarding": False}
    try:
        process = await _start(connection.create_process(command, encoding=None, window=WINDOW_BYTES, **options))
        with contextlib.suppress(BrokenPipeError):  # the command may have ended without reading
            process.stdin.write(stdin)
            process.stdin.write_eof()
        too_long = asyncio.Event()
        readers = [
            asyncio.ensure_future(_read(stream, kept, output, limit, too_long))
            for stream, kept in ((process.stdout, output.stdout), (process.stderr, output.stderr))
        ]
        try:
            await _wait_for_end(process, readers, too_long, seconds, output)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    except (asyncssh.Error, OSError) as error:
        raise ConnectFailed(f"The connection was lost while the command ran: {_error_text(error)}") from None
    _read_end(process, output)


async def _start(creation: Coroutine[Any, Any, Any]) -> Any:
    """Return the started process.

    If the call is cancelled, wait up to 5 seconds for the machine's answer, and stop the process if it was started.
    """
    starting = asyncio.ensure_future(creation)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.wait({starting}, timeout=STOP_SECONDS)
        if starting.done() and starting.exception() is None:
            process = starting.result()
            await _stop(process, asyncio.ensure_future(process.wait_closed()))
        starting.cancel()
        raise


async def _wait_for_end(
    process: Any,
    readers: Sequence[asyncio.Future[None]],
    too_long: asyncio.Event,
    seconds: float,
    output: CommandOutput,
) -> None:
    ended: asyncio.Future[Any] = asyncio.gather(*readers, process.wait_closed(), return_exceptions=True)
    cut: asyncio.Future[Any] = asyncio.ensure_future(too_long.wait())
    try:
        await asyncio.wait({ended, cut}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        output.truncated = too_long.is_set()
        output.timed_out = not ended.done() and not output.truncated
        if not ended.done():
            await _stop(process, ended)
    except asyncio.CancelledError:
        await _stop(process, ended)
        raise
    finally:
        cut.cancel()
        ended.cancel()
        await asyncio.gather(cut, ended, return_exceptions=True)


async def _stop(process: Any, ended: asyncio.Future[Any]) -> None:
    """Stop the command's process group by sending TERM and, if the group still runs after 5 seconds, KILL."""
    for signal, seconds in (("TERM", STOP_SECONDS), ("KILL", 1.0)):
        with contextlib.suppress(asyncssh.Error, OSError):
            process.send_signal(signal)
        await asyncio.wait({ended}, timeout=seconds)
        if ended.done():
            return


async def _read(stream: Any, kept: bytearray, output: CommandOutput, limit: int, too_long: asyncio.Event) -> None:
    """Read a stream to its end.

    Bytes beyond the limit are read and discarded, so that the end of the command is still detected.
    """
    while chunk := await stream.read(CHUNK_BYTES):
        output.total += len(chunk)
        if len(kept) + len(chunk) > limit:
            too_long.set()
        kept += chunk[: limit - len(kept)]


def _read_end(process: Any, output: CommandOutput) -> None:
    output.exit_code = process.exit_status
    if process.exit_signal is not None:
        output.exit_code, output.signal = None, process.exit_signal[0]
    elif output.exit_code is None and not output.timed_out and not output.truncated:
        raise ConnectFailed("The connection was lost while the command ran; whether the command ended is unknown.")


async def _open_socket(egress: Egress, machine: Machine) -> socket.socket:
    place = f"{machine.host}:{machine.port}"
    try:
        async with asyncio.timeout(machine.connect_seconds):
            addresses = await egress.addresses(machine.host, machine.port, Policy("internal"))
            connecting = asyncio.get_running_loop().run_in_executor(
                _threads, functools.partial(egress.open_socket, addresses, machine.port, machine.connect_seconds)
            )
            try:
                opened = await asyncio.shield(connecting)
            except BaseException:
                connecting.add_done_callback(_close_late)
                raise
    except EgressBlocked as blocked:
        egress.count(SINK, "blocked", machine.host)
        raise Invalid.at("/hostname", blocked.code, blocked.reason, problem="url_blocked") from None
    except TimeoutError:
        egress.count(SINK, "timed_out", machine.host)
        raise LoginTimeout(f"{place} did not answer within {machine.connect_seconds:g} seconds.") from None
    except (OSError, Unresolved) as error:
        egress.count(SINK, "failed", machine.host)
        raise ConnectFailed(f"{place} cannot be reached: {_error_text(error)}.") from None
    egress.count(SINK, "answered", machine.host)
    opened.setblocking(False)
    return opened


def _close_late(connecting: asyncio.Future[socket.socket]) -> None:
    """Close a socket that was opened after the caller stopped waiting for it."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


async def _log_in(
    machine: Machine, credential: Credential | None, client: _Client, sock: socket.socket
) -> asyncssh.SSHClientConnection:
    with_key = machine.auth_method == "key"
    keys = [] if credential is None or not with_key else [await _private_key(credential)]
    return await asyncssh.connect(
        machine.host,
        machine.port,
        sock=sock,
        client_factory=lambda: client,
        config=[],
        known_hosts=([], [], []),
        server_host_key_algs=_algorithms_for(machine.host_key),
        x509_trusted_certs=None,
        username=machine.username,
        password=None if credential is None or with_key else credential.value,
        client_keys=keys,
        preferred_auth=["publickey"] if with_key else ["password", "keyboard-interactive"],
        agent_path=None,
        agent_forwarding=False,
        gss_host=None,
        host_based_auth=False,
        disable_trivial_auth=True,
        client_version="Corral",
        login_timeout=machine.connect_seconds + machine.login_seconds,
        keepalive_interval=KEEPALIVE_SECONDS,
        keepalive_count_max=KEEPALIVES,
    )


async def _private_key(credential: Credential) -> asyncssh.SSHKey:
    try:
        return await asyncio.to_thread(asyncssh.import_private_key, credential.value, credential.passphrase)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError, ValueError):
        raise LoginFailed("The private key of the connection, or its passphrase, cannot be read.") from None


def _algorithms_for(host_key: str | None) -> list[str]:
    """Return the host key algorithms to offer, starting with the algorithm of the accepted key.

    If a machine has several keys, this order determines which key it presents.
    """
    accepted = (host_key or "").partition(" ")[0]
    first = ["rsa-sha2-512", "rsa-sha2-256"] if accepted == "ssh-rsa" else [accepted]
    return sorted(HOST_KEY_ALGORITHMS, key=lambda name: name not in first)


def _connection_or_error(opening: asyncio.Future[Any], client: _Client, place: str) -> Any:
    """Return the opened connection, or raise the error that explains why it could not be opened."""
    if client.other_key is not None:
        opening.exception()  # retrieved, so that asyncio does not log it
        raise OtherHostKey(client.other_key)
    if client.is_flooded:
        opening.exception()
        raise ConnectFailed(f"{place} sent a banner of more than {MAX_BANNER_BYTES // 1024} KiB.")
    try:
        return opening.result()
    except asyncssh.PermissionDenied as error:
        raise LoginFailed(f"{place} refused the login: {_error_text(error)}") from None
    except Problem:
        raise
    except (asyncssh.Error, OSError) as error:
        raise ConnectFailed(f"The connection to {place} failed: {_error_text(error)}.") from None


def _error_text(error: Exception) -> str:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return (reason or "the connection was closed")[:300]
