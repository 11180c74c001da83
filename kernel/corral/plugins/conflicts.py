"""Detects names that several plugins declare, such as names of settings, tables, events, jobs, metrics or sockets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from corral.plugins.record import PluginRecord

NAMED = (
    ("setting", "corral_settings"),
    ("job", "corral_jobs"),
    ("schedule", "corral_schedules"),
    ("subscriber", "corral_subscribers"),
    ("metric", "corral_metrics"),
)


def refuse_conflicts(plugins: Iterable[PluginRecord]) -> None:
    """Mark plugins that declare the same name as `failed`, except built-in plugins, which keep the name."""
    plugins = list(plugins)
    claims: dict[str, dict[str, PluginRecord]] = defaultdict(dict)
    for loaded in plugins:
        for what in _claimed(loaded, plugins):
            claims[what][loaded.name] = loaded
    for what, claimants in claims.items():
        others = [loaded for loaded in claimants.values() if not loaded.found.built_in]
        for loaded in others if len(claimants) > 1 else ():
            if loaded.active:
                rivals = sorted(name for name in claimants if name != loaded.name)
                loaded.fail(f"{what} is declared by {' and '.join(rivals)} too")


def _claimed(loaded: PluginRecord, plugins: list[PluginRecord]) -> Iterator[str]:
    for what, hook in NAMED:
        yield from (f"{what} {item.name}" for item in loaded.of(hook))
    yield from (f"socket {item.path}" for item in loaded.of("corral_sockets"))
    yield from (f"event {kind.event}" for kind in loaded.of("corral_events"))
    for other in plugins:  # tables of the plugin `files_x` begin with the prefix of the plugin `files` too
        prefix = f"{loaded.name}_"
        for model in other.of("corral_models"):
            table = model._meta.table_name
            if other is loaded or (table.startswith(prefix) and prefix.startswith(f"{other.name}_")):
                yield f"table {table}"
