"""The shell in which the commands of guides run, and the admin who types in it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pyotp
from tests.end_to_end.guide_pages import missing_lines, run_page
from tests.end_to_end.small_jq import install_jq
from tests.end_to_end.typed_commands import TypedCommands

from corral.cli.saved_sessions import SavedSessions
from corral.testing.server import PASSWORD, free_port

ADMIN = "ada@example.org"
SERVER = "127.0.0.1:8000"
"""The address of the server in all guides."""


class Admin:
    """Types what commands ask for: the address, the password, and the codes of the authenticator app."""

    def __init__(self) -> None:
        self.app: pyotp.TOTP | None = None
        self._codes = 0

    def type(self, prompt: str, arguments: Sequence[str]) -> str:
        if "code=@-" in arguments or "One-time code or recovery" in prompt:
            return self._next_code()
        return ADMIN if "Email" in prompt else PASSWORD

    def see(self, output: str) -> None:
        """Scan the seed that a command prints."""
        if '"otpauth_uri"' in output:
            app = pyotp.parse_uri(json.loads(output)["otpauth_uri"])
            assert isinstance(app, pyotp.TOTP)
            self.app = app

    def _next_code(self) -> str:
        """Return a code that was not used. The server accepts that of the next half minute, too."""
        assert self.app is not None
        self._codes += 1
        return self.app.at(int(time.time()), counter_offset=self._codes - 1)


class GuideShell:
    """The shell of an admin in a folder. The commands of guides run in it."""

    def __init__(self, folder: Path, commands: TypedCommands) -> None:
        self.folder, self.commands = folder, commands
        self.address = f"127.0.0.1:{free_port()}"
        self.addresses: Mapping[str, str] = {}
        """The addresses of other servers of the test, by those that the guides name."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CORRAL_", "OPENAI_"))}
        self.environ = {
            **kept,
            "PATH": f"{commands.folder}:{Path(sys.executable).parent}:{kept['PATH']}",
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_STATE_HOME": str(folder / "state"),
            "OPENAI_API_KEY": "sk-of-this-test-4f9a1c7d2e6b8053",
            "COLUMNS": "200",
        }
        commands.environ = {"CORRAL_RATE_LIMITS": "off", "CORRAL_BIND": self.address}

    def sign_in(self) -> None:
        """Sign in as the admin, unless that is so."""
        saved = SavedSessions(self.folder / "config" / "corral").find()
        if saved is None or (saved[1].url, saved[1].email) != (f"http://{self.address}", ADMIN):
            (self.folder / "password").write_text(PASSWORD)
            self.corral("login", f"http://{self.address}", "--email", ADMIN, "--password-file", "password")

    def corral(self, *arguments: str) -> str:
        """Return what a command, which succeeds, prints."""
        status, out, err = self.commands.run([*arguments], str(self.folder), self.environ, None)
        assert status == 0, f"{arguments}\n{out}\n{err}"
        return out

    def serve(self, *, log: Path) -> None:
        """Start the server of the folder, which runs until the shell ends."""
        environ = {**self.environ, **self.commands.environ}
        status, banner, _ = self.commands.start(["serve"], self.folder, environ, errors=log)
        assert status == 0, f"{banner}\n{log.read_text('utf-8')}"

    def run(self, page: Path, addresses: Mapping[str, str] = MappingProxyType({})) -> None:
        """Run the commands of a guide, and compare what they print with what the guide shows.

        `addresses` are those of the test, by those that the guide names.
        """
        addresses, kept = {SERVER: self.address, **self.addresses, **addresses}, self.commands.environ
        self.commands.environ = {**kept, "CORRAL_BIND": addresses[SERVER]}
        try:
            runs = run_page(page, folder=self.folder, environ=self.environ, addresses=addresses)
        finally:
            self.commands.stop_background(but=1)
            self.commands.environ = kept
        for run in runs:
            assert missing_lines(run) == [], f"{run.block.text}\nprinted:\n{run.output}"


@contextmanager
def guide_shell(folder: Path) -> Iterator[GuideShell]:
    """Make a shell in a folder. What its commands have started ends with it."""
    (folder / "bin").mkdir()
    install_jq(folder / "bin")
    with TypedCommands(folder / "bin", Admin()) as commands:
        yield GuideShell(folder, commands)
