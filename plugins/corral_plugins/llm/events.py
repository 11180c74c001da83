"""Events of the gateway."""

from __future__ import annotations

from typing import Literal

from corral.database.model import ADMIN
from corral.events.event import Event


class ProviderChanged(Event, kw_only=True):
    """A model provider was created, updated or deleted."""

    event = "llm.provider_changed"
    visibility = ADMIN

    provider: str
    change: Literal["created", "updated", "deleted"]


ALL = (ProviderChanged,)
