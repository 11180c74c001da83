"""Who loads the model layer: tasks' processes and their fork server, and nobody else."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from corral_plugins.workers.node.tools.builtin import TOOLS, ToolName


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["workers.plugin", "workers.node.command", "workers.node.worker"])
def test_server_and_worker_do_without_the_model_layer(module: str) -> None:
    run(f"import sys, corral_plugins.{module}; assert not {{'pydantic_ai', 'openai'}} & sys.modules.keys()")


def test_the_fork_server_has_loaded_all_that_a_first_request_needs() -> None:
    run(
        "import sys, corral_plugins.workers.node.preload\n"
        "from corral_plugins.workers.node.gateway_model import warm_up_imports\n"
        "before = set(sys.modules)\n"
        "warm_up_imports()\n"
        "assert not set(sys.modules) - before, set(sys.modules) - before\n"
    )


def test_every_name_has_its_tool() -> None:
    assert set(get_args(ToolName)) == set(TOOLS)
    assert all(name == tool.name for name, tool in TOOLS.items())
