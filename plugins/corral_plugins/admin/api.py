"""The public part of administration: the kill switch.

Plugins that start work, call models or deliver messages ask it first.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from corral.errors import declare_codes

declare_codes({"kill_switch": (503, "The kill switch is engaged")})

Mode = Literal["pause", "cancel"]


class KillSwitchView(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the kill switch.

    While it is `engaged`, no task is claimed and no model is called. `hold_deliveries` also holds back webhooks and
    mails.
    """

    engaged: bool
    mode: Mode
    hold_deliveries: bool
    reason: str | None
    engaged_by: str | None
    engaged_at: str | None


class KillSwitch(Protocol):
    """Reads the stored switch in the caller's unit of work, so the answer is never stale."""

    def state(self) -> KillSwitchView:
        """Return the current state."""
        ...

    def refuse_if_engaged(self) -> None:
        """Raise `Unavailable` with the code `kill_switch` while the switch is engaged."""
        ...
