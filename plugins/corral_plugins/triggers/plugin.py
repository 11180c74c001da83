"""The `triggers` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.plugin import Plugin, Setting, hookimpl
from corral_plugins.triggers import hookspecs, models, settings
from corral_plugins.triggers.api import EVENTS


class TriggersPlugin(Plugin):
    """Triggers: start work at a time, on an event, on a call from outside, or when something expected does not happen.

    Each slot of a trigger fires once, however many processes run. The history contains each fire, skip and failure.
    """

    name = "triggers"
    requires = ("accounts", "expressions")
    wants = ("admin",)
    permissions = (
        Permission("triggers.read", "Read triggers and their history", holders=READERS),
        Permission("triggers.write", "Create triggers; change and fire one's own triggers", holders=WRITERS),
        Permission("triggers.manage", "Change and fire all triggers"),
    )

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]
