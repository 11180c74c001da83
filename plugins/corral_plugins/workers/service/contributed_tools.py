"""Declares the reference worker's tools to the plugin `tools`. Each worker says at registration which it offers."""

from __future__ import annotations

from collections.abc import Iterable

from corral_plugins.tools.api import Tool
from corral_plugins.workers.node.tools.builtin import TOOLS

MAX_SECONDS = 600
PROGRAMS = ("shell.run", "python.run")
"""Their output may come from anywhere, so it is untrusted."""


def contributed_tools() -> Iterable[Tool]:
    """Yield the tools; all of them run on workers."""
    for tool in TOOLS.values():
        is_program = tool.name in PROGRAMS
        yield Tool(
            name=tool.name,
            title=tool.title,
            description=str(tool.__doc__),
            risk=tool.risk,
            schema=tool.schema(),
            runs="worker",
            idempotent=tool.idempotent,
            untrusted_output=is_program,
            timeout_seconds=MAX_SECONDS if is_program else None,
        )
