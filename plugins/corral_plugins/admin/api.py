"""The public interface of the `admin` plugin: the kill switch.

Plugins must check the switch before they start work, call models or deliver messages.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from corral.errors import declare_codes

declare_codes(
    {
        "kill_switch": (
            503,
            "The kill switch is engaged",
            "An admin stopped all agent activity. Wait, or ask an admin to resume the activity with `corral "
            "kill-switch off`.",
        )
    }
)

Mode = Literal["pause", "cancel"]


class KillSwitchView(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the kill switch.

    While the switch is `engaged`, no task is claimed and no model is called. While `hold_deliveries` is set, plugins
    that deliver messages on their own, such as webhooks and notifications, keep their deliveries pending. Account
    emails, such as those with a link for setting a password, are still sent.
    """

    engaged: bool
    mode: Mode
    hold_deliveries: bool
    reason: str | None
    engaged_by: str | None
    engaged_at: str | None


class KillSwitch(Protocol):
    """Reads the stored state of the kill switch in the caller's unit of work, so the result is never stale.

    A plugin that delivers messages must call `state()` in the unit of work that takes a delivery from the queue, and
    must leave all deliveries in the queue while `hold_deliveries` is set. `corral restore` sets `hold_deliveries`, so
    that a restored copy sends nothing while the original installation still runs.
    """

    def state(self) -> KillSwitchView:
        """Return the current state of the kill switch."""
        ...

    def refuse_if_engaged(self) -> None:
        """Raise `Unavailable` (`kill_switch`) if the kill switch is engaged."""
        ...
