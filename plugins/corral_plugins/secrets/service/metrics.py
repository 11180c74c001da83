"""The metric that counts secrets by status."""

from __future__ import annotations

from typing import get_args

import peewee

from corral.plugin import Settings
from corral_plugins.secrets.models import SecretRow
from corral_plugins.secrets.service import rows
from corral_plugins.secrets.service.environment import Environment
from corral_plugins.secrets.settings import REMINDER_DAYS
from corral_plugins.secrets.shapes import Status

STATUSES: tuple[Status, ...] = get_args(Status)


def secrets_by_status(settings: Settings, environment: Environment) -> dict[tuple[str, ...], float]:
    """Count the secrets by status in one query. Pinned secrets count as active."""
    until = rows.expiring_until(settings.get(REMINDER_DAYS))
    counters = [peewee.fn.SUM(peewee.Case(None, [(rows.status_is(status, until), 1)], 0)) for status in STATUSES]
    found = SecretRow.select(*counters).tuples().first()
    counts: dict[tuple[str, ...], float] = {
        (str(status),): float(count or 0) for status, count in zip(STATUSES, found, strict=True)
    }
    counts[("active",)] += len(environment.all())
    return counts
