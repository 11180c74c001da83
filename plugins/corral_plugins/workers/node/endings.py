"""How an attempt ends: the exit status of its process, and what the loop raises to stop at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral_plugins.workers.node.client import ApiError

# Exit statuses of the process; any other is a crash.
REPORTED, LOST, CANCELLED = 0, 10, 11
# Refusals that waiting cures: the task is given back, which costs no attempt.
GIVE_BACK = ("circuit_open", "kill_switch")


class LeaseLost(Exception):
    """Somebody else has the task, or nobody may: stop and report nothing."""


class CancelAsked(Exception):
    """The task is to be cancelled: stop; the worker acknowledges."""


class Ended(Exception):
    """The attempt has been reported."""


def heed(answer: Mapping[str, Any]) -> None:
    """Every answer to a lease call may say that it is over; raises `LeaseLost` or `CancelAsked`."""
    if answer.get("state") == "lost":
        raise LeaseLost
    if answer.get("state") == "cancel_requested":
        raise CancelAsked


def is_lost(error: ApiError) -> bool:
    """The token dies with its lease, and a deleted task is nobody's."""
    return error.code in ("lease_lost", "task_terminal") or (error.status == 401 and not error.is_foreign)
