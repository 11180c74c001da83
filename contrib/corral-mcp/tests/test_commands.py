"""`corral mcp` and `corral tools`, typed as `docs/how-to/mcp.md` shows them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import DOCS_SERVER

from corral.testing.command_line import run_corral
from corral.testing.server import EMAIL, PASSWORD, ServerProcess, free_port


class Shell:
    """Types commands as the admin of a server."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self._folder = folder
        self._environ = {**server.environ, "XDG_CONFIG_HOME": str(folder / "home"), "COLUMNS": "200"}
        (folder / "password").write_text(PASSWORD)
        self.type("login", server.address, "--email", EMAIL, "--password-file", str(folder / "password"))

    def type(self, *arguments: str, status: int = 0) -> str:
        done = run_corral(*arguments, environ=self._environ, folder=self._folder)
        assert done.exit_code == status, done.output
        return done.output

    def json(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json"))


@pytest.fixture
def docs_url(tmp_path: Path) -> Any:
    """An MCP server over HTTP in a process of its own."""
    (tmp_path / "description").write_text("Searches the documents.")
    port, log = free_port(), tmp_path / "docs.log"
    command = [sys.executable, str(DOCS_SERVER), "http", str(port), str(tmp_path / "description")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(os.environ))
    until = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


def test_the_commands_of_the_guide(tmp_path: Path, docs_url: str) -> None:
    config = tmp_path / "corral.toml"
    config.write_text('[plugins]\nenabled = ["mcp"]\n')
    environ = {"CORRAL_EGRESS_ALLOW": "127.0.0.1", "CORRAL_CONFIG": str(config)}
    with ServerProcess(tmp_path, environ=environ) as server:
        shell = Shell(tmp_path, server)
        assert "There are no MCP servers" in shell.type("mcp", "list")
        added = shell.json("mcp", "add", "docs", docs_url)
        assert added["status"] == "changed"
        assert "Searches the documents." in shell.type("mcp", "show", "docs")
        assert "changed" in shell.type("tools", "show", "mcp.docs.search")
        accepted = shell.json("mcp", "accept", "docs", "search")
        assert {tool["name"]: tool["status"] for tool in accepted["tools"]} == {
            "mcp.docs.fail": "changed",
            "mcp.docs.readpage": "changed",
            "mcp.docs.search": "ok",
        }
        assert "does not list these tools: mcp.docs.nothing" in shell.type("mcp", "accept", "docs", "nothing", status=1)
        assert shell.json("mcp", "accept", "docs", "--all")["status"] == "ok"
        assert shell.json("mcp", "accept", "docs", "--all")["status"] == "ok"
        overrides = 'tool_overrides:={"search": {"risk": "read"}, "fail": {"enabled": false}}'
        shell.type("mcp", "edit", "docs", "-f", overrides)
        assert [
            tool["name"] for tool in shell.json("tools", "list", "--risk", "read", "--source", "mcp:docs")["items"]
        ] == ["mcp.docs.search"]
        assert "disabled" in shell.type("tools", "show", "mcp.docs.fail")
        shell.type("agents", "create", "Reader", "--tool", "mcp.docs.*", "--start")
        assert "disabled" in shell.type("mcp", "edit", "docs", "-f", "enabled:=false")
        assert "docs is removed" in shell.type("mcp", "remove", "docs")
        assert "There are no MCP servers" in shell.type("mcp", "list")
