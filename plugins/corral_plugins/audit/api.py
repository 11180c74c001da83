"""The event of the audit log. Other plugins write to the log through the kernel's protocol `Audit`."""

from __future__ import annotations

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "batch_in_progress": (409, "Another run is in progress"),
        "unsupported_format": (422, "The format is not offered"),
    }
)


class AuditCheckpoint(Event, kw_only=True):
    """The audit log up to `seq` was signed. A copy kept elsewhere reveals the removal of the newest rows."""

    event = "audit.checkpoint"
    visibility = "admin"

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str


EVENTS: tuple[type[Event], ...] = (AuditCheckpoint,)
