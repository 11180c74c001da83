"""The channel types of this plugin and of other plugins."""

from __future__ import annotations

from corral.errors import Invalid
from corral.plugin import Contributions
from corral_plugins.notifications.api import ChannelType
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.email import EmailChannel
from corral_plugins.notifications.service.slack import SlackChannel
from corral_plugins.notifications.service.telegram import TelegramChannel
from corral_plugins.notifications.service.webhook import WebhookChannel

CHANNEL_BREAKER, MAIL_BREAKER = "notify", "smtp"


class ChannelTypeRegistry:
    """All types of channels. No method needs a unit of work."""

    def __init__(
        self,
        contributions: Contributions,
        email: EmailChannel,
        slack: SlackChannel,
        telegram: TelegramChannel,
        webhook: WebhookChannel,
    ) -> None:
        self._contributions = contributions
        self._own = tuple(each.definition() for each in (email, slack, telegram, webhook))

    def all(self) -> list[ChannelType]:
        """Return all types, sorted by name."""
        found: dict[str, ChannelType] = {each.type: each for each in self._own}
        for _, each in self._contributions.for_hook("corral_notification_channels"):
            found.setdefault(each.type, each)
        return [found[name] for name in sorted(found)]

    def find(self, name: str) -> ChannelType | None:
        """Return the type with this name, or None if no active plugin offers it."""
        return next((each for each in self.all() if each.type == name), None)

    def require(self, name: str) -> ChannelType:
        """Return the type with this name. Raise `Invalid` if no active plugin offers it."""
        found = self.find(name)
        if found is None:
            known = ", ".join(each.type for each in self.all())
            raise Invalid.at("/type", "not_in_enum", f"one of {known}")
        return found

    def breaker_of(self, row: Channel) -> str:
        """Return the name of the circuit breaker of a channel."""
        kind = self.find(row.type)
        return f"{CHANNEL_BREAKER}:{row.id}" if kind is None or kind.breaker is None else kind.breaker
