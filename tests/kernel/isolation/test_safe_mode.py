"""Safe mode, by real processes: three crashes at start lead to it, an orderly restart out of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from corral.cli.start_history import StartHistory
from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import EMAIL, ServerProcess

CRASHING = '''
"""Takes the process down when it starts."""
import os
from pathlib import Path

from corral.plugin import Plugin


class CrashingPlugin(Plugin):
    """Takes the process down."""

    name = "crashing"

    async def start(self, runtime):
        if Path("__file__").with_name("crash").exists():
            os._exit(9)
'''


def crash(server: ServerProcess) -> None:
    with pytest.raises(RuntimeError, match="exited with"):
        server.start()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_plugins_7_three_crashes_lead_to_safe_mode(tmp_path: Path, processes: str) -> None:
    trigger = tmp_path / "crash"
    PluginFolder(tmp_path / "plugins").add(
        "crashing", CRASHING.replace('Path("__file__").with_name("crash")', f"Path({str(trigger)!r})")
    )
    (tmp_path / "corral.toml").write_text('[plugins]\nenabled = ["crashing"]\n', "utf-8")
    environ = {"CORRAL_CONFIG": str(tmp_path / "corral.toml"), "CORRAL_PLUGIN_DIR": str(tmp_path / "plugins")}
    server = ServerProcess(tmp_path, environ=environ, arguments=("--no-embedded-worker", "--processes", processes))
    try:
        server.start()  # the installation exists, with its admin
        assert "corral-safe-mode" not in server.client().get(f"{server.address}/health").headers
        server.stop()
        trigger.touch()
        for _ in range(3):
            crash(server)
        server.start()
        assert server.client().get(f"{server.address}/health").headers["corral-safe-mode"] == "1"
        with server.sign_in(EMAIL) as admin:
            states = {each["name"]: each for each in admin.get("/plugins", params={"limit": 200}).json()["items"]}
            assert (states["crashing"]["state"], states["crashing"]["reason"]) == ("disabled", "safe mode")
            others = {each["state"] for each in states.values() if not each["protected"]}
            assert (others, states["accounts"]["state"]) == ({"disabled"}, "active")
            assert admin.get("/tasks").json()["code"] == "plugin_disabled"
            alerts = admin.get("/events", params={"types": "system.alert"}).json()["items"]
            assert "safe_mode" in [each["data"]["kind"] for each in alerts]
        trigger.unlink()
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGHUP)  # a reload leaves it, and so would a restart
        for _ in range(200):
            with contextlib.suppress(Exception), server.client() as client:
                if "corral-safe-mode" not in client.get(f"{server.address}/health").headers:
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(0.1)
        server.stop()
        server.start()
        assert "corral-safe-mode" not in server.client().get(f"{server.address}/health").headers
        with server.sign_in(EMAIL) as admin:
            assert admin.get("/plugins/crashing").json()["state"] == "active"
    finally:
        server.kill()


def test_it_can_be_asked_for(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, environ={"CORRAL_SAFE_MODE": "1"}) as server:
        assert server.client().get("/health").headers["corral-safe-mode"] == "1"


def test_only_crashes_count(tmp_path: Path) -> None:
    for _ in range(3):
        told = StartHistory(tmp_path)
        told.begin()
        told.record_clean_exit()
    going_on = [StartHistory(tmp_path) for _ in range(4)]
    for each in going_on:
        each.begin()
    assert not StartHistory(tmp_path).is_crash_loop
    for each in going_on[:3]:  # as when their processes end
        assert each._record is not None
        os.close(each._record[1])
    assert StartHistory(tmp_path).is_crash_loop
    old = sorted((tmp_path / "run" / "starts").iterdir())
    os.utime(old[0], (1.0, 1.0))
    assert not StartHistory(tmp_path).is_crash_loop
    going_on[3].ready()
    assert list((tmp_path / "run" / "starts").iterdir()) == []
