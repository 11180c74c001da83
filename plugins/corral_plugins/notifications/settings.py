"""Settings of the `notifications` plugin."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from corral.plugin import Setting
from corral_plugins.notifications.service.event_catalogue import DEFAULTS
from corral_plugins.notifications.service.mentions import MENTION

MAX_URL = 2048
Delay = Annotated[int, Meta(ge=0, le=172_800)]

RETENTION_DAYS = Setting(
    name="notifications.retention_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=3650,
    title="Days for which read notifications and ended deliveries are kept",
)
UNREAD_RETENTION_DAYS = Setting(
    name="notifications.unread_retention_days",
    kind=int,
    default=365,
    minimum=1,
    maximum=3650,
    title="Days for which unread notifications are kept",
)
RETRY_SCHEDULE = Setting[list[int]](
    name="notifications.retry_schedule",
    kind=list[Delay],
    default=[0, 10, 60, 300, 1800, 7200, 21_600],
    minimum=1,
    maximum=20,
    title="Seconds to wait before each attempt to deliver a notification",
    description="The list contains one delay per delivery attempt, so its length is the maximum number of attempts.",
)


def _are_known_entries(value: dict[str, bool], settings: object) -> str | None:
    unknown = sorted(value.keys() - {*DEFAULTS, MENTION})
    return f"has an unknown entry: {unknown[0]}" if unknown else None


DEFAULT_NOTIFICATIONS = Setting[dict[str, bool]](
    name="notifications.defaults",
    kind=dict[str, bool],
    default={},
    check=_are_known_entries,
    title="Events about which people are notified even without a rule",
    description="Maps event names to true (notify people) or false (do not notify them). People are notified about "
    "events that are not listed.",
)


def _is_url(value: str | None, settings: object) -> str | None:
    return None if value is None or value.startswith(("http://", "https://")) else "must begin with http:// or https://"


CONSOLE_URL = Setting(
    name="notifications.console_url",
    kind=str | None,
    default=None,
    maximum=MAX_URL,
    check=_is_url,
    title="Base URL of the links in notifications",
    description="If null, links in notifications begin with the value of CORRAL_PUBLIC_URL.",
)
ALL = (RETENTION_DAYS, UNREAD_RETENTION_DAYS, RETRY_SCHEDULE, DEFAULT_NOTIFICATIONS, CONSOLE_URL)
