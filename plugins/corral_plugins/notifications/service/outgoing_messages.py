"""Builds outgoing notifications, with links to the objects that they are about. No method needs a unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from corral.plugin import InstallationConfig, Settings
from corral.redact.redactor import Redactor
from corral_plugins.notifications.api import OutgoingItem, OutgoingNotification, Severity
from corral_plugins.notifications.models import Delivery
from corral_plugins.notifications.settings import CONSOLE_URL

LIST_HREF, PREFERENCES_HREF = "/api/v1/notifications", "/api/v1/notifications/preferences"
LIST_COMMAND = "See them: corral notifications list"


class OutgoingMessages:
    """Turns deliveries into notifications for channels, and redacts known credentials once more."""

    def __init__(self, settings: Settings, installation: InstallationConfig, redactor: Redactor) -> None:
        self._settings, self._public_url, self._redactor = settings, installation.public_url, redactor

    def of_delivery(self, row: Delivery, *, to: str | None = None) -> OutgoingNotification:
        """Return the notification of a delivery. `to` is the recipient's address if there is only one recipient."""
        items = [msgspec.convert(self._redactor.redact_json(each), OutgoingItem) for each in row.items]
        return self.build(
            {"id": row.id, "severity": row.severity, "count": row.count, "created_at": row.created_at},
            items,
            to=to,
            served=row.served,
        )

    def build(
        self,
        facts: Mapping[str, Any],
        items: list[OutgoingItem],
        *,
        to: str | None = None,
        served: list[str] | None = None,
    ) -> OutgoingNotification:
        """Return a notification about the given events.

        `facts` contains the id, severity, count and time of the notification.
        """
        first, count = items[0], facts["count"]
        title, body = (first.title, first.body) if count == 1 else _summary(items, count)
        return OutgoingNotification(
            id=facts["id"],
            event=first.event,
            severity=cast(Severity, facts["severity"]),
            title=title,
            body=body,
            count=count,
            items=items,
            url=self.link(first.href if count == 1 else LIST_HREF),
            preferences_url=self.link(PREFERENCES_HREF),
            created_at=facts["created_at"],
            to=to,
            served=[] if served is None else served,
        )

    def link(self, href: str | None) -> str | None:
        """Return the URL of an object.

        Return None if `href` is None, or if the address of the installation is not configured.
        """
        base = self._settings.get(CONSOLE_URL) or self._public_url
        return None if base is None or href is None else base.rstrip("/") + href


def _summary(items: list[OutgoingItem], count: int) -> tuple[str, str]:
    """Return the title and body of a message about several events.

    Together, they contain the number of events and the first titles.
    """
    names = {each.event for each in items}
    about = items[0].event if len(names) == 1 else "events"
    lines = [f"- {each.title}" for each in items]
    if count > len(items):
        lines.append(f"and {count - len(items)} more")
    lines.append(LIST_COMMAND)
    return f"{count} × {about}", "\n".join(lines)
