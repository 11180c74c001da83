"""What goes over the wire, as text. An event is encoded once for all who see it."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.events.log import Record
from corral.schema.shapes import encode


class EventFrame(msgspec.Struct, kw_only=True):
    """A live or replayed event."""

    type: str = "event"
    event: str
    id: str
    seq: int
    ts: str
    data: msgspec.Raw
    actor: dict[str, str | None]


class Frames:
    """Encodes records; the last one is kept, since its viewers come one after the other."""

    def __init__(self) -> None:
        self._seq, self._text = -1, ""

    def of(self, record: Record) -> str:
        """The frame of a record."""
        if record.seq != self._seq:
            frame = EventFrame(
                event=record.type, id=record.id, seq=record.seq, ts=record.ts, data=msgspec.Raw(record.data),
                actor={"type": record.actor_type, "id": record.actor_id},
            )  # fmt: skip
            self._seq, self._text = record.seq, encode(frame).decode()
        return self._text


def frame(kind: str, **members: Any) -> str:
    """Any other frame."""
    return encode({"type": kind, **members}).decode()
