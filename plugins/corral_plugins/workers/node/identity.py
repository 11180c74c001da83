"""Who this worker is: registered once, the token kept in a folder of its own (0700, files 0600)."""

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
    """What registering brought. Seconds are the server's wishes."""

    url: str
    worker_id: str
    token: str
    heartbeat_seconds: int = 15
    lease_seconds: int = 60


class InUse(Exception):
    """Another worker runs with this folder."""


class Unusable(Exception):
    """The folder cannot be made or written."""


class Losses:
    """When the token of this worker died. Another worker with its fingerprint takes it each time it registers."""

    TIMES, SECONDS = 3, 300.0

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=self.TIMES)

    def note(self) -> bool:
        """It died once more; whether that is so often that another worker must be at it."""
        self._times.append(time.monotonic())
        return len(self._times) == self.TIMES and self._times[-1] - self._times[0] < self.SECONDS


class Folder:
    """Where a worker keeps its identity. Names: `fingerprint`, `identity.json`, `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other workers out of it; `InUse`, `Unusable`."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise Unusable(f"The folder {self.path} cannot be used (--dir): {error.strerror}.") from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InUse(f"Another worker runs with {self.path}; give this one a --name of its own.") from None
            yield

    def fingerprint(self) -> str:
        """Random, made once: by it the server knows this worker again."""
        path = self.path / "fingerprint"
        with contextlib.suppress(OSError):
            if kept := path.read_text(encoding="ascii").strip():
                return kept
        made = secrets.token_hex(16)
        self._write("fingerprint", made.encode())
        return made

    def load(self, url: str) -> Identity | None:
        """The identity for this server; None: not registered there, or the file is damaged."""
        try:
            identity = msgspec.json.decode((self.path / "identity.json").read_bytes(), type=Identity)
        except (OSError, msgspec.DecodeError):
            return None
        return identity if identity.url == url else None

    def store(self, identity: Identity) -> None:
        """Keep it; the file appears whole or not at all."""
        self._write("identity.json", msgspec.json.encode(identity))

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f".{name}.new"  # one that was left half written is written anew
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            raise Unusable(f"The folder {self.path} cannot be written (--dir): {error.strerror}.") from None
