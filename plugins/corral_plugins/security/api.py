"""What other plugins may know of API keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from corral.errors import declare_codes

declare_codes({"would_lock_out": (409, "You would lock yourself out")})


class KeyCounts(Protocol):
    """Joins the caller's unit."""

    def active(self, user_ids: Iterable[str]) -> dict[str, int]:
        """How many keys that work each of these people has; people without any are left out."""
        ...
