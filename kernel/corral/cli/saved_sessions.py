"""The servers that the user has signed in to, kept in the user's configuration folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import msgspec


class SavedSession(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The saved credentials for a server: a session, or a token that the user supplied.

    Without `refresh_token`, the token cannot be renewed. This is the case for the session of a sealed server, for an
    API key and for any other token that the user supplied. `expires_at` is in epoch seconds of this machine's clock,
    and is None for tokens that the user supplied.
    """

    url: str
    token: str
    email: str | None = None
    refresh_token: str | None = None
    expires_at: float | None = None


class _Sessions(msgspec.Struct, kw_only=True):
    current: str | None = None
    servers: dict[str, SavedSession] = {}


class SavedSessions:
    """The file `sessions.json` (mode 0600).

    Each method reads the file again, because other commands may have changed it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "sessions.json"

    def find(self, server: str | None = None) -> tuple[str, SavedSession] | None:
        """Return the name and the session of a server, given its name or URL. The default is the current server.

        If several saved servers have the given URL, return the current one if it is among them, otherwise the first.
        """
        saved = self._read()
        wanted = server or saved.current
        if wanted is None:
            return None
        same = [name for name, session in saved.servers.items() if session.url == wanted.rstrip("/")]
        found = [wanted] if wanted in saved.servers else [saved.current] if saved.current in same else same
        return next(((name, saved.servers[name]) for name in found), None)

    def names(self) -> list[str]:
        """Return the names of all servers."""
        return list(self._read().servers)

    def store(self, name: str, session: SavedSession, *, make_current: bool = False) -> None:
        """Store a session, replacing any existing session with the same name."""
        saved = self._read()
        if make_current:
            saved.servers.pop(name, None)  # the order of the servers is the order of the sign-ins
            saved.current = name
        saved.servers[name] = session
        self._write(saved)

    def remove(self, name: str) -> None:
        """Remove a session. If it was the current session, the previous one becomes current again."""
        saved = self._read()
        saved.servers.pop(name, None)
        if saved.current not in saved.servers:
            saved.current = next(reversed(saved.servers), None)
        self._write(saved)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock, so that concurrent commands renew a session one at a time."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = os.open(self._folder / "sessions.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)

    def _read(self) -> _Sessions:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return _Sessions()
        try:
            return msgspec.json.decode(content, type=_Sessions)
        except msgspec.MsgspecError as error:
            detail = f"{self._path} is damaged ({error}); delete the file and sign in again with `corral login`"
            raise click.ClickException(detail) from None

    def _write(self, saved: _Sessions) -> None:
        """Replace the file atomically, so that a killed command leaves either the old or the new file."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(dir=self._folder, prefix=".sessions-")  # mode 0600
        try:
            with os.fdopen(number, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(saved), indent=2))
                file.flush()
                os.fsync(file.fileno())
            Path(draft).rename(self._path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def user_sessions() -> SavedSessions:
    """Return the user's sessions, which are stored in `$XDG_CONFIG_HOME/corral` or `~/.config/corral`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".config"
    except RuntimeError:
        raise click.ClickException("the home folder cannot be determined; set HOME or XDG_CONFIG_HOME") from None
    return SavedSessions(folder / "corral")


def server_name(url: str) -> str:
    """Return the name under which a server is stored by default: the host, and the port if the URL has one."""
    return urlsplit(url).netloc.rpartition("@")[2]
