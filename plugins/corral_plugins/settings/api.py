"""What other plugins may know of settings: the event. Values are read by `corral.plugin.Settings`."""

from __future__ import annotations

from corral.events.event import Event


class SettingChanged(Event, kw_only=True):
    """A setting has another value. Read it again: the event does not tell it."""

    event = "setting.changed"
    visibility = "admin"

    category: str
    key: str
    source: str  # database | default (it was reset)
