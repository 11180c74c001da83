"""Detects names that more than one plugin declares, such as the names of settings, tables, events, jobs or routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from corral.plugins.record import PluginRecord

NAMED = ("setting", "job", "schedule", "subscriber", "metric")  # contributions that have a name


def refuse_conflicts(plugins: Iterable[PluginRecord]) -> None:
    """Mark third-party plugins as `failed` if they declare a name that another plugin also declares."""
    owners = {f"{record.name}_": record for record in plugins}
    claims: dict[str, dict[str, PluginRecord]] = defaultdict(dict)
    is_safe = all(record.found.built_in for record in owners.values())  # no two built-in plugins claim the same name
    for record in () if is_safe else owners.values():
        for name in _claimed_names(record, owners):
            claims[name][record.name] = record
    for name, claimants in claims.items():
        for record in claimants.values() if len(claimants) > 1 else ():
            if record.active and not record.found.built_in:
                rivals = sorted(rival for rival in claimants if rival != record.name)
                record.fail(f"{name} is also declared by {' and '.join(rivals)}")


def _claimed_names(record: PluginRecord, owners: Mapping[str, PluginRecord]) -> Iterator[str]:
    for kind in NAMED:
        yield from (f"{kind} {item.name}" for item in record.contributions_to(f"corral_{kind}s"))
    yield from (route.label for group in record.contributions_to("corral_routes") for route in group)
    yield from (f"socket {item.path}" for item in record.contributions_to("corral_sockets"))
    yield from (f"event {event.event}" for event in record.contributions_to("corral_events"))
    prefix = f"{record.name}_"
    for start, other in owners.items():  # tables of the `files_x` plugin begin with the prefix of `files` too
        if prefix.startswith(start):
            tables = (model._meta.table_name for model in other.contributions_to("corral_models"))
            yield from (f"table {table}" for table in tables if other is record or table.startswith(prefix))
