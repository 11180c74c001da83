"""A plugin changes what is everybody's in a process: who comes after it serves the same installation, with a log."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import EMAIL, JobsProcess, ServerProcess

CHANGING = """
import logging
import os

from corral.plugin import Plugin

logging.disable(logging.CRITICAL)
logging.basicConfig(force=True)
logging.getLogger("corral.serve").disabled = True
os.umask(0)
os.chdir({away!r})
for name in [name for name in os.environ if name.startswith("CORRAL_")]:
    del os.environ[name]


class ChangingPlugin(Plugin):
    \"\"\"Changes what is everybody's.\"\"\"

    name = "changing"

    async def start(self, runtime):
        os.chdir({away!r})
"""


LEAVING = """
import threading
import time

from corral.plugin import Plugin

threading.Thread(target=time.sleep, args=(3600,), name="left").start()


class LeavingPlugin(Plugin):
    \"\"\"Leaves a thread.\"\"\"

    name = "leaving"
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "away").mkdir()
    PluginFolder(tmp_path / "plugins").add("changing", CHANGING.format(away=str(tmp_path / "away")))
    (tmp_path / "corral.toml").write_text('[plugins]\nenabled = ["changing"]\ndir = "plugins"\n', "utf-8")
    return {"CORRAL_CONFIG": "corral.toml", "CORRAL_DATA_DIR": "data"}


def await_line(process: ServerProcess | JobsProcess, text: str, *, times: int = 1) -> None:
    until = time.monotonic() + 90
    while process.log.count(text) < times:
        assert time.monotonic() < until, process.log
        time.sleep(0.1)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_reload_serves_the_same_installation(tmp_path: Path, environ: dict[str, str], processes: str) -> None:
    arguments = ("--no-embedded-worker", "--processes", processes)
    server = ServerProcess(tmp_path, environ=environ, arguments=arguments)
    try:
        server.start()
        assert server.process is not None
        assert "Umask:\t0000" not in Path(f"/proc/{server.process.pid}/status").read_text("ascii")
        os.kill(server.process.pid, signal.SIGHUP)
        await_line(server, '"event":"reloaded"')
        with server.sign_in(EMAIL) as admin:
            assert admin.get("/plugins/changing").json()["state"] == "active"
        assert not list((tmp_path / "away").iterdir())
        lines = [line for line in server.log.splitlines() if line.startswith("{")]
        assert all(json.loads(line)["event"] for line in lines)
    finally:
        server.kill()


def test_what_a_plugin_leaves_keeps_no_process_from_ending(tmp_path: Path) -> None:
    PluginFolder(tmp_path / "plugins").add("leaving", LEAVING)
    (tmp_path / "corral.toml").write_text('[plugins]\nenabled = ["leaving"]\ndir = "plugins"\n', "utf-8")
    server = ServerProcess(tmp_path, environ={"CORRAL_CONFIG": "corral.toml"})
    try:
        server.start()
        assert server.stop() == 0
        assert '"threads":["MainThread","left"]' in server.log
    finally:
        server.kill()


def test_jobs_begin_again_at_the_same_installation(tmp_path: Path, environ: dict[str, str]) -> None:
    server = ServerProcess(tmp_path, environ=environ)
    jobs = JobsProcess(server.environ, tmp_path)
    try:
        jobs.start()
        assert jobs.process is not None
        os.kill(jobs.process.pid, signal.SIGHUP)
        await_line(jobs, "Jobs are running", times=2)
        assert not list((tmp_path / "away").iterdir())
    finally:
        jobs.kill()
