"""What other plugins may know of administration: the kill switch, which those ask who start work, call out or
deliver.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from corral.errors import declare_codes

declare_codes({"kill_switch": (503, "The kill switch is engaged")})

Mode = Literal["pause", "cancel"]


class KillSwitchView(msgspec.Struct, frozen=True, kw_only=True):
    """The switch. While `engaged` no task is claimed and no model is called; `hold_deliveries` holds webhooks and
    mails too.
    """

    engaged: bool
    mode: Mode
    hold_deliveries: bool
    reason: str | None
    engaged_by: str | None
    engaged_at: str | None


class KillSwitch(Protocol):
    """Joins the caller's unit: the answer is that of the row."""

    def state(self) -> KillSwitchView:
        """The switch as it is."""
        ...

    def refuse_if_engaged(self) -> None:
        """Raise `Unavailable(kill_switch)` while it is engaged."""
        ...
