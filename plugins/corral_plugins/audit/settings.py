"""Settings of the audit log."""

from __future__ import annotations

from corral.plugin import Setting

RETENTION_DAYS: Setting[int | None] = Setting(
    name="audit.retention_days",
    own_session=True,
    kind=int,
    default=None,
    minimum=30,
    maximum=36_500,
    title="Retention of audit rows (days)",
    description="If unset, rows are kept forever. Removal starts at the oldest row and ends at a signed checkpoint.",
)
VERBOSE = Setting(
    name="audit.verbose",
    own_session=True,
    kind=bool,
    default=False,
    title="Record every request",
    description="Reads and ordinary writes are recorded as well, so every request writes one row.",
)
RECORD_IP = Setting(
    name="audit.record_ip",
    own_session=True,
    kind=bool,
    default=True,
    title="Record client addresses",
    description="If off, new rows contain neither the address nor the user agent of the client.",
)

ALL = (RETENTION_DAYS, VERBOSE, RECORD_IP)
