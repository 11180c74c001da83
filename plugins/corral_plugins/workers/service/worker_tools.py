"""Adds the tools of the reference worker to the `tools` plugin.

When a worker registers, it reports which of these tools it offers.
"""

from __future__ import annotations

from collections.abc import Iterable

from corral_plugins.tools.api import Tool
from corral_plugins.workers.node.tools.builtin import MAX_SECONDS, TOOLS

PROGRAMS = ("shell.run", "python.run")
"""Tools that run arbitrary programs. Their output can come from any source, and is therefore untrusted."""


def reference_worker_tools() -> Iterable[Tool]:
    """Yield the definitions of the tools. All of these tools run on workers."""
    for tool in TOOLS.values():
        is_program = tool.name in PROGRAMS
        yield Tool(
            name=tool.name,
            title=tool.title,
            description=str(tool.__doc__),
            risk=tool.risk,
            schema=tool.arguments_schema(),
            runs="worker",
            idempotent=tool.idempotent,
            untrusted_output=is_program,
            timeout_seconds=MAX_SECONDS if is_program else None,
        )
