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
    title="Days for which audit rows are kept (unset: forever)",
    description="The oldest audit rows are removed first, and removal always ends at a signed checkpoint.",
)
VERBOSE = Setting(
    name="audit.verbose",
    own_session=True,
    kind=bool,
    default=False,
    title="Whether the audit log records every request",
    description="If true, every request adds one row, including reads and writes that are otherwise not audited.",
)
RECORD_IP = Setting(
    name="audit.record_ip",
    own_session=True,
    kind=bool,
    default=True,
    title="Whether the audit log records client addresses",
    description="If false, new audit rows contain neither the client's address nor its user agent.",
)

ALL = (RETENTION_DAYS, VERBOSE, RECORD_IP)
