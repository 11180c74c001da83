"""The hook specifications that the `triggers` plugin defines."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.triggers.api import TaintCheck, TriggerAction, TriggerKind

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_trigger_kinds() -> Iterable[TriggerKind]:  # type: ignore[empty-body]
    """Contribute kinds of triggers. A kind is ignored if another kind already has the same type."""


@hookspec
def corral_trigger_actions() -> Iterable[TriggerAction]:  # type: ignore[empty-body]
    """Contribute actions for triggers. An action is ignored if another action already has the same type."""


@hookspec
def corral_trigger_taint_checks() -> Iterable[TaintCheck]:  # type: ignore[empty-body]
    """Contribute checks that determine which of the objects named in events may contain untrusted text."""
