"""A loop on the event loop that swallows what is raised in it: the process ends, by itself or when it is told to."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import ServerProcess

PLUGIN = '''
"""A plugin of a test."""
from corral.auth.principal import PUBLIC
from corral.http.routes import Routes
from corral import watchdog
from corral.plugin import Plugin, hookimpl

watchdog.EXIT_SECONDS = %(seconds)s
routes = Routes("/swallower", tag="Of a test")


@routes.get("/", needs=PUBLIC)
async def hang() -> dict[str, int]:
    """Hang."""
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


class SwallowerPlugin(Plugin):
    """Of a test."""

    name = "swallower"

    @hookimpl
    def corral_routes(self):
        return [routes]
'''


def hung(folder: Path, seconds: float) -> ServerProcess:
    """A server whose event loop stands still, and would be ended after that."""
    plugins = PluginFolder(folder / "plugins")
    plugins.add("swallower", PLUGIN % {"seconds": seconds})
    (folder / "corral.toml").write_text('[plugins]\nenabled = ["swallower"]\n', "utf-8")
    environ = {"CORRAL_CONFIG": str(folder / "corral.toml"), "CORRAL_PLUGIN_DIR": str(plugins.path)}
    server = ServerProcess(folder, environ=environ).start()
    with server.client() as client, pytest.raises(httpx2.HTTPError):
        client.get("/swallower", timeout=4)
    return server


def test_a_second_signal_ends_a_process_whose_loop_stands_still(tmp_path: Path) -> None:
    server = hung(tmp_path, 300.0)
    try:
        process = server.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        server.kill()


def test_a_process_whose_loop_does_not_come_back_ends_and_names_the_plugin(tmp_path: Path) -> None:
    began = time.monotonic()
    server = hung(tmp_path, 6.0)
    try:
        assert server.process is not None
        assert server.process.wait(120) == 70
        assert time.monotonic() - began >= 6.0
        told = next(line for line in server.log.splitlines() if "event loop blocked; process exits" in line)
        assert "swallower" in told
        assert "the call was abandoned and is still running" in server.log
    finally:
        server.kill()
