"""Leases: rows that ensure that only one process of an installation does a particular kind of work at a time."""

from __future__ import annotations

import peewee

from corral import clock
from corral.database.model import InstantField, Model
from corral.database.statement import Parameter, Statement


class Lease(Model):
    """A named lease. After the instant `until`, any process may acquire it."""

    name = peewee.CharField(primary_key=True, max_length=120)
    holder = peewee.CharField(max_length=80)
    until = InstantField()

    class Meta:
        table_name = "kernel_leases"


def _acquire(p: Parameter) -> peewee.Query:
    taken = {Lease.holder: p("holder"), Lease.until: p("until")}
    is_ours = (Lease.until < p("now")) | (Lease.holder == p("holder"))
    insert = Lease.insert({Lease.name: p("name"), **taken})
    return insert.on_conflict(conflict_target=[Lease.name], update=taken, where=is_ours)


_ACQUIRE = Statement(_acquire)


def acquire_lease(name: str, holder: str, seconds: float) -> bool:
    """Acquire or renew the lease with one conditional upsert.

    Return whether `holder` now holds the lease for `seconds` seconds.
    """
    return _ACQUIRE.run({"name": name, "holder": holder, "until": clock.now(seconds), "now": clock.now()}) > 0


def release_lease(name: str, holder: str) -> None:
    """Release the lease if `holder` still holds it."""
    Lease.update(until=clock.now(-1)).where((Lease.name == name) & (Lease.holder == holder)).execute()


def release_leases(holder: str) -> None:
    """Release all leases that `holder` holds."""
    Lease.update(until=clock.now(-1)).where(Lease.holder == holder).execute()


def lease_holder(name: str) -> str | None:
    """Return the lease's current holder, or None if the lease is free."""
    row = Lease.get_or_none((Lease.name == name) & (Lease.until > clock.now()))
    return None if row is None else str(row.holder)
