"""The hook specifications of the `triggers` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.triggers.api import TriggerAction, TriggerKind

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_trigger_kinds() -> Iterable[TriggerKind]:  # type: ignore[empty-body]
    """Contribute kinds of triggers. If another kind already has the same type, the kind is ignored."""


@hookspec
def corral_trigger_actions() -> Iterable[TriggerAction]:  # type: ignore[empty-body]
    """Contribute actions that triggers start. If another action already has the same type, the action is ignored."""
