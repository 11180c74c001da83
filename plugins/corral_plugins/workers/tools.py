"""The reference worker's tools, as the server knows them; whether a worker brings one it says when it registers."""

from __future__ import annotations

from collections.abc import Iterable

from corral_plugins.tools.api import Tool
from corral_plugins.workers.node.tools.table import TOOLS

LONGEST_SECONDS = 600
PROGRAMS = ("shell.run", "python.run")
"""What they print may come from anywhere."""


def contributed() -> Iterable[Tool]:
    """One for each; they run on workers, by permit."""
    for tool in TOOLS.values():
        yield Tool(
            name=tool.name,
            title=tool.title,
            description=tool.description,
            risk=tool.risk,
            schema=tool.schema,
            runs="worker",
            idempotent=tool.repeatable,
            untrusted_output=tool.name in PROGRAMS,
            timeout_seconds=LONGEST_SECONDS if tool.name in PROGRAMS else None,
        )
