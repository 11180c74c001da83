"""What other plugins may know of the audit log: its event. They write to it by the kernel's protocol `Audit`."""

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
    """The audit log up to `seq` was signed; keep it elsewhere, and cutting off the newest rows shows."""

    event = "audit.checkpoint"
    visibility = "admin"

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str


EVENTS: tuple[type[Event], ...] = (AuditCheckpoint,)
