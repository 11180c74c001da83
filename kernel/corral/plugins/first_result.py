"""Hooks of which one plugin answers: who serves a URL of the configuration."""

from __future__ import annotations

from typing import Any

from corral import hookspecs
from corral.errors import Refused
from corral.plugins.loading import manager_of
from corral.plugins.record import PluginRecord, attempt, block

ASKS_FOR = {"corral_blob_store": "[storage] url"}  # the keys that ask for a first result; else [redis] url


def first_result(plugins: list[PluginRecord], hook: str, url: str) -> Any:
    """What the first active plugin that takes the URL makes of it, built-in ones being asked last. One that raises is
    `failed`; none: `Refused`.
    """
    made: list[Any] = []
    for loaded in sorted(plugins, key=lambda item: item.found.built_in):
        if loaded.active and not made:
            ask = getattr(manager_of(loaded, [hookspecs]).hook, hook)
            attempt(loaded, lambda ask=ask: made.extend(item for item in [ask(url=url)] if item is not None))  # type: ignore[misc]  # bound per round
    block(plugins)
    if not made:
        key, scheme = ASKS_FOR.get(hook, "[redis] url"), url.partition(":")[0]
        raise Refused(f"{key}: no active plugin serves {scheme}:// (hook {hook}); install one, or remove the key")
    return made[0]
