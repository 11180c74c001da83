"""The public interface of the audit log: its error codes, and the event about a signed checkpoint.

Plugins record audit entries through the kernel protocol `Audit`.
"""

from __future__ import annotations

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "batch_in_progress": (409, "Another run is in progress", "Wait until the running operation has ended."),
        "unsupported_format": (422, "The format is not supported", "Use one of the formats that the detail names."),
    }
)


class AuditCheckpointSigned(Event, kw_only=True):
    """A checkpoint that covers the audit log up to row `seq` was signed.

    To detect the removal of the newest rows, keep copies of this event outside Corral and compare them with the log.
    """

    event = "audit.checkpoint"
    visibility = "admin"

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str


EVENTS: tuple[type[Event], ...] = (AuditCheckpointSigned,)
