"""`{{ secrets.NAME }}` in the headers of a request: filled in when it is sent, kept as written everywhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from corral.database.engine import Work
from corral_plugins.secrets.api import Secrets
from corral_plugins.tools.api import ToolContext, ToolFailure

_BRACES = re.compile(r"\{\{\s*secrets\.([A-Za-z][A-Za-z0-9_.-]{0,127})\s*\}\}")
_ANY = re.compile(r"\{\{[^{}]*\bsecrets\b[^{}]*\}\}")


def refuse_elsewhere(*texts: Any) -> None:
    """Secrets stand in the values of headers only: addresses and bodies are logged, echoed and indexed by strangers."""
    if any(isinstance(text, str) and _ANY.search(text) for text in texts):
        raise ToolFailure("invalid_arguments", "{{ secrets.NAME }} may stand in the values of headers only.")


class HeaderSecrets:
    """Opens its own unit."""

    secrets: Secrets | None

    def __init__(self, work: Work) -> None:
        self._work = work

    async def filled(self, headers: Mapping[str, str], *, tool: str, host: str, context: ToolContext) -> dict[str, str]:
        """The headers with values from the vault, as far as it gives them to this tool or agent and to this host."""
        refuse_elsewhere(*headers)
        wanted = {name for value in headers.values() for name in _BRACES.findall(value)}
        for value in headers.values():
            if _ANY.search(_BRACES.sub("", value)):
                raise ToolFailure(
                    "invalid_arguments", "Write {{ secrets.NAME }}; nothing else may stand in its braces."
                )
        if not wanted:
            return dict(headers)
        secrets = self.secrets
        if secrets is None:
            raise ToolFailure("plugin_disabled", "There is no vault here that would know secrets.")
        consumers = (f"tool:{tool}", f"agent:{context.caller.agent_id or context.caller.id}")
        values = await self._work(
            lambda: {name: secrets.use(name, consumers, host) for name in sorted(wanted)}, read=True
        )
        filled = {name: _BRACES.sub(lambda match: values[match[1]], value) for name, value in headers.items()}
        for value in filled.values():
            if not value.isprintable():
                raise ToolFailure("invalid_arguments", "The value of this secret does not fit into a header.")
        return filled
