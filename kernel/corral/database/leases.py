"""Leases: rows that ensure that only one process of an installation performs a given task at a time."""

from __future__ import annotations

import peewee

from corral import clock
from corral.database.model import InstantField, Model


class Lease(Model):
    """A named lease. After the instant `until`, any process may acquire it."""

    name = peewee.CharField(primary_key=True, max_length=120)
    holder = peewee.CharField(max_length=80)
    until = InstantField()

    class Meta:
        table_name = "kernel_leases"


def acquire_lease(name: str, holder: str, seconds: float) -> bool:
    """Acquire or renew the lease with one conditional upsert.

    Return whether `holder` holds it for the next `seconds`.
    """
    taken = {"holder": holder, "until": clock.now(seconds)}
    is_ours = (Lease.until < clock.now()) | (Lease.holder == holder)
    upsert = Lease.insert(name=name, **taken).on_conflict(conflict_target=[Lease.name], update=taken, where=is_ours)
    return bool(upsert.as_rowcount().execute())


def release_lease(name: str, holder: str) -> None:
    """Release the lease if `holder` still holds it."""
    Lease.update(until=clock.now(-1)).where((Lease.name == name) & (Lease.holder == holder)).execute()


def lease_holder(name: str) -> str | None:
    """Return the current holder, or None if the lease is free."""
    row = Lease.get_or_none((Lease.name == name) & (Lease.until > clock.now()))
    return None if row is None else str(row.holder)
