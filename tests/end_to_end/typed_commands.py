"""`corral` for the shell of a test: commands are forks of a process that has imported Corral, and prompts are answered.

The `corral` in `folder` is a small program that sends its arguments, folder, environment and input to this process.
Commands that ask for something run on a terminal, where the answer is typed. Commands that run until they are stopped
(`serve`, `jobs`, `worker`) are started in the background.
"""

from __future__ import annotations

import json
import os
import select
import socketserver
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from tests.kernel.cli.warm import WORKERS, warm

CLIENT = """#!{python} -IS
import json, os, socket, stat, sys
given = os.fstat(0).st_mode
stdin = sys.stdin.read() if stat.S_ISFIFO(given) or stat.S_ISREG(given) else None
job = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "environ": dict(os.environ), "stdin": stdin}}
with socket.socket(socket.AF_UNIX) as relay:
    relay.connect({address!r})
    relay.sendall(json.dumps(job).encode() + b"\\n")
    status, out, err = json.loads(relay.makefile().read())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""
READY = {"serve": "Corral is ready", "jobs": "Jobs are running", "worker": " at http"}
PROMPTS = ("login", "user create", "user reset-password")


class Person(Protocol):
    """Who sits at the terminal."""

    def type(self, prompt: str, arguments: Sequence[str]) -> str:
        """Return what the person types at a prompt of a command."""
        ...

    def see(self, output: str) -> None:
        """Look at what a command prints."""
        ...


class TypedCommands:
    """The relay. `environ` contains variables of the commands that the shell does not set."""

    def __init__(self, folder: Path, person: Person) -> None:
        self.folder, self.person = folder, person
        self.environ: dict[str, str] = {}
        self._running: list[Any] = []
        self._address = str(folder / "relay")
        (folder / "corral").write_text(CLIENT.format(python=sys.executable, address=self._address))
        (folder / "corral").chmod(0o755)

    def __enter__(self) -> Self:
        relay = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                job = json.loads(self.rfile.readline())
                self.wfile.write(json.dumps(relay.run(**job)).encode())

        self._server = socketserver.ThreadingUnixStreamServer(self._address, Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_background()
        self._server.shutdown()
        self._server.server_close()

    def stop_background(self, *, but: int = 0) -> None:
        """Stop the servers and workers that the commands have started, but not the first ones."""
        for process in self._running[but:]:
            process.terminate()
        for process in self._running[but:]:
            process.wait(120)
        del self._running[but:]

    def run(
        self, arguments: list[str], cwd: str, environ: Mapping[str, str], stdin: str | None
    ) -> tuple[int, str, str]:
        """Run a command. Return its exit status, its output and its errors."""
        environ = {**environ, **self.environ}
        if arguments and arguments[0] in READY:
            return self.start(arguments, Path(cwd), environ)
        if stdin is None and _asks(arguments):
            status, out, err = self._type(arguments, Path(cwd), environ)
        else:
            done = warm().run(arguments, cwd=Path(cwd), environ=environ, stdin=stdin or "")
            status, out, err = done.returncode, done.stdout, done.stderr
        self.person.see(out)
        return status, out, err

    def start(
        self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str], *, errors: Path | None = None
    ) -> tuple[int, str, str]:
        """Start a server or a worker, and return when it is ready or has ended. `errors` is the file of its log."""
        log = self.folder / f"{arguments[0]}-{len(self._running)}.log"
        log.write_bytes(b"")
        modules = WORKERS if arguments[0] == "worker" else ()
        process = warm(*modules).start(arguments, cwd=cwd, environ=environ, log=log, errors=errors)
        self._running.append(process)
        until = time.monotonic() + 90
        while READY[arguments[0]] not in (told := log.read_text("utf-8")):
            if process.poll() is not None or time.monotonic() > until:
                return process.poll() or 1, "", told
            time.sleep(0.02)
        return 0, told, ""

    def _type(self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> tuple[int, str, str]:
        """Run a command on a terminal, and answer its prompts."""
        ours, theirs = os.openpty()
        terminal, out = os.ttyname(theirs), self.folder / "typed.out"
        out.write_bytes(b"")
        process = warm().start(arguments, cwd=cwd, environ=environ, log=out, errors=Path(terminal), stdin=terminal)
        shown, prompt, until = "", "", time.monotonic() + 90
        while True:
            if select.select([ours], [], [], 0.02)[0]:
                prompt += os.read(ours, 4096).decode()
            elif process.poll() is not None:
                break
            assert time.monotonic() < until, f"{arguments} still runs: {shown}{prompt}"
            if prompt.endswith(": "):
                os.write(ours, f"{self.person.type(prompt, arguments)}\n".encode())
                shown, prompt = shown + prompt, ""
        os.close(theirs)
        os.close(ours)
        return process.wait(), out.read_text("utf-8"), shown + prompt


def _asks(arguments: Sequence[str]) -> bool:
    """Return whether a command asks for something, or for a fresh proof of the identity."""
    if any(argument.startswith("--password-file") or argument == "--with-token" for argument in arguments):
        return False
    called = " ".join(arguments)
    return (
        called.startswith(PROMPTS)
        or called.endswith(" --password")
        or (
            called.startswith("api ")
            and any(argument.endswith(("@-", "/reveal", "/reset-mfa")) for argument in arguments)
        )
    )
