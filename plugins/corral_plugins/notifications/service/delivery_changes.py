"""Computes row changes for deliveries that end or wait. No function accesses the database."""

from __future__ import annotations

from typing import Any

from corral import clock


def ended_columns(status: str) -> dict[str, Any]:
    """Return the changes to the row of a delivery that ends with the given status.

    A running attempt loses its lease.
    """
    waiting = dict.fromkeys(("next_attempt_at", "due_at", "lease", "lease_until"))
    return {"status": status, "finished_at": clock.now(), "is_collecting": False, **waiting}


def waiting_columns(instant: str) -> dict[str, Any]:
    """Return the changes to the row of a delivery that waits until the given instant."""
    return {"next_attempt_at": instant, "due_at": instant, "lease": None, "lease_until": None}
