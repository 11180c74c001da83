"""The identity of a worker: its token and fingerprint.

The identity is stored in the worker's folder. The folder has mode 0700, and its files have mode 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec


class WorkerIdentity(msgspec.Struct, kw_only=True):
    """The result of a registration, with the heartbeat interval and the lease duration that the server specified."""

    url: str
    worker_id: str
    token: str
    heartbeat_seconds: int = 15
    lease_seconds: int = 60


class FolderInUse(Exception):
    """Raised if another worker is using the folder."""


class FolderUnusable(Exception):
    """Raised if the worker's folder cannot be created or written to."""


class DuplicateWorkerDetector:
    """Detects another worker with the same fingerprint.

    Whenever one of two such workers registers, the token of the other is revoked.
    """

    TIMES, SECONDS = 3, 300.0

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=self.TIMES)

    def record_revoked_token(self) -> bool:
        """Record that a token was revoked. Return whether three tokens were revoked within 300 s.

        Three revoked tokens within this time mean that another worker probably has the same fingerprint.
        """
        self._times.append(time.monotonic())
        return len(self._times) == self.TIMES and self._times[-1] - self._times[0] < self.SECONDS


class WorkerFolder:
    """The folder that stores the worker's identity: the files `fingerprint`, `identity.json` and `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def lock_folder(self) -> Iterator[None]:
        """Create the folder and lock it until the `with` block ends.

        Raise `FolderInUse` if another worker is using the folder, or `FolderUnusable` if the folder cannot be created
        or written to.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise FolderUnusable(
                f"The folder {self.path} cannot be used: {error.strerror}. Choose another --dir."
            ) from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderInUse(
                    f"Another worker is using {self.path}; start this worker with another --name or --dir."
                ) from None
            yield

    def fingerprint(self) -> str:
        """Return the random fingerprint that lets the server recognise this worker.

        The fingerprint is created on first use.
        """
        path = self.path / "fingerprint"
        with contextlib.suppress(OSError):
            if stored := path.read_text(encoding="ascii").strip():
                return stored
        created = secrets.token_hex(16)
        self._write_file("fingerprint", created.encode())
        return created

    def load_identity(self, url: str) -> WorkerIdentity | None:
        """Return the stored identity for a server.

        Return None if the worker is not registered with this server, or if the file is corrupt.
        """
        try:
            identity = msgspec.json.decode((self.path / "identity.json").read_bytes(), type=WorkerIdentity)
        except (OSError, msgspec.DecodeError):
            return None
        return identity if identity.url == url else None

    def store_identity(self, identity: WorkerIdentity) -> None:
        """Store an identity atomically. Raise `FolderUnusable` if the folder is not writable."""
        self._write_file("identity.json", msgspec.json.encode(identity))

    def _write_file(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.new"  # a file that a crash left behind is overwritten
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            raise FolderUnusable(
                f"The folder {self.path} cannot be written: {error.strerror}. Choose another --dir."
            ) from None
