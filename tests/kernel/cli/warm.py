"""`corral` without its imports, which are two thirds of the time of a command: forks of a process that has done them.

A fork has its own folder, environment, streams and status, as any process has. Run as a script this file is the process
that forks: it reads one job a line and answers with a status a line.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TYPICAL = ("migrate", "--json")  # imports what most commands do


class Warm:
    """Runs commands as `subprocess.run` does, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(
        self, arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str], stdin: str, seconds: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """The process that has ended, with what it wrote."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="corral-command-") as name:
            streams = [Path(name, stream) for stream in ("in", "out", "err")]
            streams[0].write_text(stdin, "utf-8")
            job = {"arguments": arguments, "cwd": str(cwd), "environ": dict(environ), "streams": [*map(str, streams)]}
            patience = threading.Timer(seconds, self.close)
            patience.start()
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            told = self._process.stdout.readline()
            patience.cancel()
            if not told:
                raise subprocess.TimeoutExpired([*arguments], seconds)
            out, err = (path.read_text("utf-8") for path in streams[1:])
        return subprocess.CompletedProcess([*arguments], int(told), out, err)

    def close(self) -> None:
        """End it, and the command that runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@functools.cache
def warm() -> Warm:
    """That of this test process."""
    made = Warm()
    atexit.register(made.close)
    return made


def _serve() -> None:
    """In the process that forks."""
    del sys.path[0]  # the folder of this file, which `python -m corral` does not have
    with tempfile.TemporaryDirectory() as name:
        for module in _imported(Path(name)):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _imported(folder: Path) -> list[str]:
    """What a command has imported at its end."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        job = {
            "arguments": TYPICAL,
            "cwd": str(folder),
            "streams": [os.devnull] * 3,
            "environ": {name: text for name, text in os.environ.items() if not name.startswith("CORRAL_")},
        }
        try:
            _become(job)
        finally:
            os.write(write, "\n".join(sys.modules).encode())
            os._exit(0)
    os.close(write)
    with open(read) as told:
        found = told.read().splitlines()
    os.waitpid(pid, 0)
    return [name for name in found if name != "__main__"]


def _become(job: dict[str, Any]) -> None:
    """Be `python -m corral …`; ends with SystemExit. What Python's own streams hold is nothing: a job is a line."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"])
    sys.path.insert(0, job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT
    for number, (name, how) in enumerate(zip(job["streams"], (os.O_RDONLY, flags, flags), strict=True)):
        opened = os.open(name, how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["corral", *job["arguments"]]
    runpy.run_module("corral", run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    _serve()
