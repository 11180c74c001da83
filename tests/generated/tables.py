"""What a request changed in the database, whichever tables there are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from corral.database.unit import current
from corral.testing.kit import Kit

# Times at which something was last seen tell of the asking, not of an effect.
SEEN = ("last_seen_at", "last_used_at", "last_used_ip", "seen_at")
# Denials are written down, and enough of them queue a checkpoint; leases are renewed by the time, whoever asks; the
# process reports its counts of provider calls to the breakers every half second.
OTHERS = ("audit", "circuit_breakers_breakers", "kernel_leases")
NOT_COUNTED = {"kernel_jobs": "WHERE name NOT LIKE 'audit.%%'"}
Picture = Mapping[str, Counter[str]]


async def picture(kit: Kit) -> Picture:
    """Every row of every table, as digests by table."""
    return dict(await kit.kernel.database.work(_rows, read=True))


def _rows() -> dict[str, Counter[str]]:
    engine: Any = current().database.engine
    found: dict[str, Counter[str]] = {}
    for table in engine.get_tables():
        if table.startswith(OTHERS):
            continue
        cursor = engine.execute_sql(f'SELECT * FROM "{table}" {NOT_COUNTED.get(table, "")}')
        names = [column[0] for column in cursor.description]
        kept = [index for index, name in enumerate(names) if name not in SEEN]
        found[table] = Counter(_digest([row[index] for index in kept]) for row in cursor.fetchall())
    return found


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(repr([bytes(v) if isinstance(v, memoryview) else v for v in values]).encode()).hexdigest()


def changed(before: Picture, after: Picture) -> list[str]:
    """The tables that differ, and by how many rows."""
    return [
        f"{table}: {(after[table] - before.get(table, Counter())).total()} rows came or changed, "
        f"{(before.get(table, Counter()) - after[table]).total()} went"
        for table in sorted(after)
        if after[table] != before.get(table, Counter())
    ]
