"""Leases: rows by which only one process of an installation at a time does a job that must not run in parallel."""

from __future__ import annotations

import peewee

from corral import clock
from corral.database.model import InstantField, Model


class Lease(Model):
    """A named lease. It is free after `until`."""

    name = peewee.CharField(primary_key=True, max_length=120)
    holder = peewee.CharField(max_length=80)
    until = InstantField()
    fence = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "kernel_leases"


def acquire(name: str, holder: str, seconds: float) -> bool:
    """Acquire or renew the lease with one conditional update.

    Return whether `holder` holds it for the next `seconds`.
    """
    until, now = clock.now(seconds), clock.now()
    taken = (
        Lease.update(holder=holder, until=until, fence=Lease.fence + 1)
        .where((Lease.name == name) & ((Lease.until < now) | (Lease.holder == holder)))
        .execute()
    )
    if taken:
        return True
    row = Lease.insert(name=name, holder=holder, until=until, fence=1).on_conflict_ignore().execute()
    return bool(row) and Lease.select().where((Lease.name == name) & (Lease.holder == holder)).exists()


def release(name: str, holder: str) -> None:
    """Release the lease if `holder` still holds it."""
    Lease.update(until=clock.now(-1)).where((Lease.name == name) & (Lease.holder == holder)).execute()


def holder_of(name: str) -> str | None:
    """Return the current holder, or None if the lease is free."""
    row = Lease.get_or_none((Lease.name == name) & (Lease.until > clock.now()))
    return None if row is None else str(row.holder)
