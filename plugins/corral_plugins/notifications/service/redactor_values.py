"""Loads the secrets of all channels into this process's redactor, at startup and after every change."""

from __future__ import annotations

from collections.abc import Mapping

from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.redact.redactor import Redactor
from corral_core.event_log.api import TableRedactorValues
from corral_plugins.notifications.api import NotificationChannelChanged
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.credentials import ChannelCredentials


class ChannelRedactorValues(TableRedactorValues[Channel]):
    """Keeps the redactor's copy of channel credentials up to date."""

    source = "notifications"
    model = Channel
    changes = (NotificationChannelChanged.event,)
    entry = UnitContext(label="notifications.redactor_values", actor=SYSTEM)

    def __init__(self, work: Work, redactor: Redactor, credentials: ChannelCredentials) -> None:
        super().__init__(work, redactor)
        self._credentials = credentials

    def _open(self, row: Channel) -> Mapping[str, str]:
        secrets = self._credentials.readable_secrets(row) or {}
        return {f"{row.id}.{name}": text for name, text in secrets.items()}
