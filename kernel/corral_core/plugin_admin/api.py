"""The public interface of the `plugin_admin` plugin: the event that reports changes in plugin states."""

from __future__ import annotations

import msgspec

from corral.events.event import Event


class PluginStateChanged(Event, kw_only=True):
    """The state of a plugin changed."""

    event = "plugin.state"
    visibility = "admin"
    area = "plugins"

    name: str
    from_: str = msgspec.field(name="from")
    to: str
    reason: str | None
