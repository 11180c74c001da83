"""The public interface of the plugin `settings`: its event, and the settings that belong to no other plugin.

Other plugins read values through `corral.plugin.Settings`.
"""

from __future__ import annotations

from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from corral.events.event import Event
from corral.plugin import Setting, Settings


class SettingChanged(Event, kw_only=True):
    """A setting changed. The event does not carry the value; read the setting again."""

    event = "setting.changed"
    visibility = "admin"

    category: str
    key: str
    source: str  # `database`, or `default` after a reset


def _is_zone(value: str, settings: Settings) -> str | None:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return "must be the name of a time zone, such as Europe/Berlin"
    return None


SITE_NAME = Setting(
    name="general.site_name",
    kind=str,
    default="Corral",
    title="Name of this installation",
    minimum=1,
    maximum=100,
    pattern=r"[^\x00-\x1f\x7f]*",
)
TIMEZONE = Setting(
    name="general.timezone",
    kind=str,
    default="UTC",
    title="Time zone in which times are displayed",
    check=_is_zone,
    minimum=1,
    maximum=64,
)
