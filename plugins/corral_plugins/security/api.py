"""The service that tells other plugins how many API keys users have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from corral.errors import declare_codes

declare_codes({"would_lock_out": (409, "You would lock yourself out")})


class KeyCounts(Protocol):
    """Counts API keys. Joins the caller's unit of work."""

    def active(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return the number of active keys of each user; users without active keys are left out."""
        ...
