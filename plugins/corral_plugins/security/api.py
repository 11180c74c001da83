"""The service `ApiKeyCounts`, which reports the number of API keys of each user to other plugins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from corral.errors import declare_codes

declare_codes(
    {
        "would_lock_out": (
            409,
            "You would lock yourself out",
            "The change would lock out its author. Include your own address or second factor, or use "
            "force if the operation offers it.",
        )
    }
)


class ApiKeyCounts(Protocol):
    """Counts API keys. Runs in the caller's unit of work."""

    def count_active_keys(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return the number of active keys of each user. Users without active keys are omitted."""
        ...
