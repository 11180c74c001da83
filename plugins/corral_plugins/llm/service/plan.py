"""A call that was begun, and what came of it."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import Entry
from corral_plugins.llm.service.calls import Ending
from corral_plugins.llm.service.providers import Target

NEUTRAL = frozenset({"model", "messages", "input", "stream", "stream_options", "n", "store", "user", "encoding_format"})


class Plan(msgspec.Struct, frozen=True):
    """A call that was begun: its row, and what may serve it, first to last."""

    call_id: str
    targets: list[Target]
    request: dict[str, Any]
    by: Principal
    entry: Entry
    began: float

    def ending(self) -> Ending:
        """What the row says if nothing more is heard."""
        first = self.targets[0]
        return Ending(status="cancelled", attempts=0, provider=first.connection.name, model=first.model[:200])

    def ignored(self, target: Target) -> list[str]:
        """The request's fields that this target does not act on."""
        return sorted(name for name in self.request if name not in NEUTRAL and name not in target.provider.honours)


class Served(msgspec.Struct, frozen=True):
    """An answer, and what it came from."""

    response: dict[str, Any]
    call_id: str
    model: str
    ignored: list[str]
