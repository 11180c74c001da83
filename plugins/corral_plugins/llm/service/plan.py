"""A call that was begun, and what came of it."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import Entry
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.service.registry import Target
from corral_plugins.llm.service.slots import Ticket

NEUTRAL = frozenset({"model", "messages", "input", "stream", "stream_options", "n", "store", "user", "encoding_format"})


class Plan(msgspec.Struct, kw_only=True):
    """A call that was begun: its row, what may serve it, first to last, and its place with the first of them."""

    call_id: str
    kind: str
    targets: list[Target]
    ticket: Ticket | None
    request: dict[str, Any]
    input_tokens: int
    by: Principal
    entry: Entry
    began: float

    def outcome(self) -> Outcome:
        """What the row says if nothing more is heard."""
        return Outcome(target=self.targets[0], input_estimate=self.input_tokens)

    def ignored(self, target: Target) -> list[str]:
        """The request's fields that this target does not act on."""
        honoured = target.provider.honours
        return sorted(name for name in self.request if name not in NEUTRAL and name not in honoured)


class Served(msgspec.Struct, frozen=True):
    """An answer, and what it came from. `cost`: USD as text, or `unpriced`."""

    response: dict[str, Any]
    call_id: str
    model: str
    ignored: list[str]
    cost: str
