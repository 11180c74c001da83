"""What the gateway tells of itself."""

from __future__ import annotations

from typing import Literal

from corral.database.model import ADMIN
from corral.events.event import Event


class ProviderChanged(Event, kw_only=True):
    """A provider of models was made, changed or deleted."""

    event = "llm.provider_changed"
    visibility = ADMIN

    provider: str
    change: Literal["created", "updated", "deleted"]


ALL = (ProviderChanged,)
