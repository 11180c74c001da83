"""Settings of the vault."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from corral.plugin import Setting

Days = Annotated[int, Meta(ge=1, le=365)]

MAX_VERSIONS = Setting(
    name="secrets.default_max_versions",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Default number of versions kept for each secret",
)
REMINDER_DAYS = Setting[list[int]](
    name="secrets.reminder_days",
    kind=list[Days],
    default=[30, 7, 1],
    maximum=5,
    title="Days before the expiry of a secret at which admins receive a reminder",
)
DELETED_DAYS = Setting(
    name="secrets.deleted_retention_days",
    kind=int,
    default=30,
    minimum=1,
    maximum=365,
    title="Days during which a deleted secret can be restored",
)
ALL = (MAX_VERSIONS, REMINDER_DAYS, DELETED_DAYS)
