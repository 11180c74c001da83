"""The hook specification of the `notifications` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.notifications.api import ChannelType

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_notification_channels() -> Iterable[ChannelType]:  # type: ignore[empty-body]
    """Contribute notification channel types. A channel type is ignored if another type already has the same name."""
