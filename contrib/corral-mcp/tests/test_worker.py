"""A worker starts MCP servers as commands, and an agent uses their tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DOCS_SERVER, run_agent


def test_an_agent_uses_a_server_that_the_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "description").write_text("Searches the documents.")
    command = {"command": sys.executable, "args": [str(DOCS_SERVER), "stdio", str(tmp_path / "description")]}
    found = run_agent(tmp_path, {"docs": command}, "mcp.docs.search", {"text": "corral"})
    assert found["status"] == "succeeded"
    assert found["result"] == {
        "source": "mcp:docs",
        "trust": "untrusted",
        "is_error": False,
        "structured": {"result": "found corral"},
    }


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        ({"docs": {"command": "no-such-command"}}, "docs (no-such-command) does not start"),
        ({"docs": {"url": "https://example.org/mcp"}}, "corral mcp add"),
    ],
)
def test_a_worker_says_what_it_cannot_start(tmp_path: Path, servers: Any, told: str) -> None:
    from click.testing import CliRunner

    from corral_plugins.workers.node.command import worker_command

    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    arguments = ["--url", "http://127.0.0.1:9", "--dir", str(tmp_path / "worker"), "--mcp", str(file)]
    found = CliRunner().invoke(worker_command, arguments)
    assert found.exit_code == 1
    assert told in found.output
