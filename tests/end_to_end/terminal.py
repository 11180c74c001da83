"""A person at a terminal: the commands of a user who has signed in to a server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.kernel.cli.warm import warm

from corral.cli.saved_sessions import SavedSessions
from corral.testing.server import EMAIL, PASSWORD, ServerProcess


class Terminal:
    """`terminal("agents", "list")`: the command of a person who has signed in to the server."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self.folder, self.server, self.address = folder, server, server.address
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        self.environ = {**kept, "XDG_CONFIG_HOME": str(folder / "config"), "COLUMNS": "200"}
        self.sessions = SavedSessions(folder / "config" / "corral")

    def run(
        self, *arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = warm().run(arguments, cwd=self.folder, environ={**self.environ, **(environ or {})}, stdin=stdin)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def __call__(self, *arguments: str, stdin: str = "", **environ: str) -> str:
        """What the command, which succeeds, prints."""
        done = self.run(*arguments, stdin=stdin, environ=environ)
        assert done.returncode == 0, done
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def on_a_terminal(self, *arguments: str, **environ: str) -> str:
        """What a person sees, colours included."""
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "corral", *arguments]
        subprocess.run(
            command, cwd=self.folder, env={**self.environ, "TERM": "xterm", **environ}, stdout=theirs, check=True
        )
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as screen:
            return screen.read(65536).decode()


@contextlib.contextmanager
def signed_in(folder: Path, config: str) -> Iterator[Terminal]:
    """A server with this configuration, to which the person has signed in."""
    path = folder / "corral.toml"
    path.write_text(config)
    with ServerProcess(folder, arguments=(), environ={"CORRAL_CONFIG": str(path)}) as server:
        made = Terminal(folder, server)
        (folder / "password").write_text(f"{PASSWORD}\n")
        made("login", server.address, "--email", EMAIL, "--password-file", "password")
        yield made


def until(condition: Callable[[], Any]) -> Any:
    """Wait for the condition, and return what it returned."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found
