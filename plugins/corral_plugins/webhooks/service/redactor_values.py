"""Loads all webhook secrets and headers into the redactor of this process, at startup and after every change."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from corral.crypto import InvalidSealedValue
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.redact.redactor import Redactor
from corral_core.event_log.api import TableRedactorValues
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.credentials import WebhookCredentials


class WebhookRedactorValues(TableRedactorValues[Webhook]):
    """Keeps the redactor's copy of all webhook secrets and headers up to date."""

    source = "webhooks"
    model = Webhook
    changes = ("webhook.created", "webhook.updated", "webhook.deleted")
    entry = UnitContext(label="webhooks.redactor_values", actor=SYSTEM)

    def __init__(self, work: Work, redactor: Redactor, credentials: WebhookCredentials) -> None:
        super().__init__(work, redactor)
        self._credentials = credentials

    def _open(self, row: Webhook) -> Mapping[str, str]:
        values: dict[str, str] = {}
        with contextlib.suppress(InvalidSealedValue):  # the credentials that are damaged cannot be sent either
            values |= {f"{row.id}.secret{n}": text for n, text in enumerate(self._credentials.secrets(row))}
            values |= {f"{row.id}.{name}": text for name, text in self._credentials.headers(row).items()}
        return values
