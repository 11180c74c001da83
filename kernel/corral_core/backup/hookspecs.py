"""The hook specification of the `backup` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_core.backup.api import RestoreStep

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_restore_steps() -> Iterable[type[RestoreStep]]:  # type: ignore[empty-body]
    """Return the service classes that adapt restored rows. `corral_services` must also provide each of them."""
