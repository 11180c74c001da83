"""The worker's identity: its token and fingerprint, stored in a folder of its own (0700, files 0600)."""

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


class Identity(msgspec.Struct, kw_only=True):
    """The result of a registration, with the intervals that the server asked for."""

    url: str
    worker_id: str
    token: str
    heartbeat_seconds: int = 15
    lease_seconds: int = 60


class InUse(Exception):
    """Another worker is using the folder."""


class Unusable(Exception):
    """The folder cannot be created or written."""


class TokenLosses:
    """Recognizes another worker with the same fingerprint: each revokes the other's token when it registers."""

    TIMES, SECONDS = 3, 300.0

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=self.TIMES)

    def note(self) -> bool:
        """Note a lost token. Returns whether the losses are so frequent that another worker must cause them."""
        self._times.append(time.monotonic())
        return len(self._times) == self.TIMES and self._times[-1] - self._times[0] < self.SECONDS


class Folder:
    """The folder with the worker's identity: files `fingerprint`, `identity.json` and `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the folder. Raises `InUse` and `Unusable`."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise Unusable(f"The folder {self.path} cannot be used: {error.strerror}. Choose another --dir.") from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InUse(f"Another worker is using {self.path}; give this one another --name or --dir.") from None
            yield

    def fingerprint(self) -> str:
        """Return the random fingerprint by which the server recognizes this worker; created on first use."""
        path = self.path / "fingerprint"
        with contextlib.suppress(OSError):
            if stored := path.read_text(encoding="ascii").strip():
                return stored
        created = secrets.token_hex(16)
        self._write("fingerprint", created.encode())
        return created

    def load(self, url: str) -> Identity | None:
        """Load the identity for a server. None: not registered there, or the file is damaged."""
        try:
            identity = msgspec.json.decode((self.path / "identity.json").read_bytes(), type=Identity)
        except (OSError, msgspec.DecodeError):
            return None
        return identity if identity.url == url else None

    def store(self, identity: Identity) -> None:
        """Store an identity, atomically."""
        self._write("identity.json", msgspec.json.encode(identity))

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.new"  # overwritten if a crash left it behind
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            raise Unusable(
                f"The folder {self.path} cannot be written: {error.strerror}. Choose another --dir."
            ) from None
