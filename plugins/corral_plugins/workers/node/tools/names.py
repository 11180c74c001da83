"""Names of the tools that a worker can bring."""

from __future__ import annotations

from typing import Literal, get_args

ToolName = Literal["workspace.read", "workspace.list", "workspace.write", "shell.run", "python.run"]
TOOL_NAMES: tuple[str, ...] = get_args(ToolName)
