"""Settings of the audit log."""

from __future__ import annotations

from corral.plugin import Setting

RETENTION_DAYS: Setting[int | None] = Setting(
    name="audit.retention_days",
    kind=int,
    default=None,
    minimum=30,
    maximum=36_500,
    title="Days rows are kept",
    description="Unset: for ever. Rows go as a whole beginning of the log that ends at a signed checkpoint.",
)
VERBOSE = Setting(
    name="audit.verbose",
    kind=bool,
    default=False,
    title="Record every request",
    description="Reads and ordinary writes too: a row each, so each request writes.",
)
RECORD_IP = Setting(
    name="audit.record_ip",
    kind=bool,
    default=True,
    title="Record addresses",
    description="Off: rows written from now on tell neither the address nor the program of the client.",
)

ALL = (RETENTION_DAYS, VERBOSE, RECORD_IP)
