"""Servers that nobody here wrote: one from PyPI as a command of a worker, one from npm over HTTP (with `--long`).

They are installed at the first run, into folders below the temporary folder of the tests.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World, on_the_loop_of_the_module, run_agent

from corral.testing.server import free_port

pytestmark = pytest.mark.usefixtures("only_long")
PYTHON_SERVER, NODE_SERVER = "mcp-server-time", "@modelcontextprotocol/server-everything"


@pytest.fixture
def only_long(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("downloads servers; use --long")


def run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_server_from_pypi_as_a_command_of_a_worker(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "env", folder=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", PYTHON_SERVER, folder=tmp_path)
    command = {"command": python, "args": ["-m", "mcp_server_time"]}
    arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    found = run_agent(tmp_path, {"time": command}, "mcp.time.convert_time", arguments)
    assert found["status"] == "succeeded"
    assert "21:00" in str(found["result"])


@contextlib.contextmanager
def everything(folder: Path) -> Iterator[str]:
    """The reference server of the protocol, over HTTP; its URL."""
    npm = shutil.which("npm") or str(Path(sys.executable).parent / "npm")
    run(npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", NODE_SERVER, folder=folder)
    port = free_port()
    node = shutil.which("node") or str(Path(sys.executable).parent / "node")
    script = folder / "node_modules" / NODE_SERVER / "dist" / "index.js"
    process = subprocess.Popen([node, str(script), "streamableHttp"], env={"PORT": str(port)}, cwd=folder)
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < until
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@on_the_loop_of_the_module
async def test_a_server_from_npm_over_http(world: World, tmp_path: Path) -> None:
    with everything(tmp_path) as url:
        view = await world.add(url, "everything")
        assert (view["status"], view["last_error"]) == ("changed", None)
        await world.accept(view)
        call = await world.run("mcp.everything.*")
        found: Any = (await call("mcp.everything.echo", message="hello")).json()
    assert found["status"] == "succeeded", found
    assert "hello" in found["result"]["text"]
