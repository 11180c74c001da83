"""The public interface of the `settings` plugin: the event that reports changed settings.

Other plugins read values through `corral.plugin.Settings`.
"""

from __future__ import annotations

from corral.events.event import Event


class SettingChanged(Event, kw_only=True):
    """A setting changed. The event does not contain the value; read the setting again."""

    event = "setting.changed"
    visibility = "admin"

    category: str
    key: str
    source: str  # `database`, or `default` after a reset
