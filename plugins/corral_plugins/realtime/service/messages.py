"""The messages that clients and the server exchange over `/ws`, and the encoding of events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.errors import Problem
from corral.events.log import LoggedEvent
from corral.ids import ID_PATTERN
from corral.schema.conversion import encode
from corral.schema.strict_json import parse_json

MESSAGE_LIMIT = 64 * 1024

FilterName = Literal[
    "agent_id", "task_id", "workflow_id", "run_id", "worker_id", "conversation_id", "status", "priority"
]
Filter = Annotated[dict[FilterName, Annotated[str, Meta(max_length=100)]], Meta(max_length=8)]
EventName = Annotated[str, Meta(min_length=1, max_length=100)]
Cursor = Annotated[str, Meta(min_length=1, max_length=64)] | Annotated[int, Meta(ge=0)]


class MessageBase(msgspec.Struct, tag_field="type", tag=str.lower, kw_only=True, forbid_unknown_fields=True):
    """Base class of the messages that clients send."""


class AuthMessage(MessageBase, tag="auth"):
    """Signs the client in, or renews the connection's credential with a new token of the same user."""

    token: Annotated[str, Meta(min_length=1, max_length=8192)]


class PingMessage(MessageBase, tag="ping"):
    """Requests a `pong`."""


class SubscribeMessage(MessageBase, tag="subscribe"):
    """Subscribes to an event name or a pattern such as `task.*` or `*`.

    If `since` is set, events after that position are replayed first.
    """

    event: EventName
    filter: Filter | UnsetType = UNSET
    since: Cursor | UnsetType = UNSET


class UnsubscribeMessage(MessageBase, tag="unsubscribe"):
    """Ends all subscriptions to `event`, regardless of their filters."""

    event: EventName


class ResumeMessage(MessageBase, tag="resume"):
    """Replays the events after a position for all subscriptions."""

    last_event_id: Cursor


ClientMessage = AuthMessage | PingMessage | SubscribeMessage | UnsubscribeMessage | ResumeMessage


class Refusal(Exception):
    """Raised if a client message cannot be accepted. The server responds with an `error` frame."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail
        super().__init__(f"{code}: {detail}")


def parse_message(message: str | bytes) -> ClientMessage:
    """Parse a client message. Raise `Refusal` if it is not valid."""
    if isinstance(message, bytes):
        raise Refusal("malformed_json", "Send text frames, not binary ones.")
    try:
        value = parse_json(message.encode("utf-8", "surrogatepass"))
    except Problem as problem:
        raise Refusal("malformed_json", problem.detail) from None
    try:
        said: ClientMessage = msgspec.convert(value, ClientMessage)
    except msgspec.ValidationError as error:
        raise Refusal(
            "validation_error", f"{error}. Valid types are auth, ping, subscribe, unsubscribe and resume."
        ) from None
    return said


def read_cursor(cursor: str | int) -> str:
    """Validate a cursor, which is the `seq` or the id of an event, and return it as text.

    Raise `Refusal` for any other value.
    """
    text = str(cursor)
    if (text.isascii() and text.isdigit() and len(text) < 19) or ID_PATTERN.fullmatch(text):
        return text
    raise Refusal("validation_error", "A cursor is the seq or the id of an event.")


class _EncodedEvent(msgspec.Struct, tag_field="type", tag="event", kw_only=True):
    event: str
    id: str
    seq: int
    ts: str
    data: msgspec.Raw
    actor: dict[str, str | None]


class EventFrame:
    """An event to deliver. It is parsed and encoded at most once for all viewers."""

    __slots__ = ("_chunk", "_payload", "_text", "record")

    def __init__(self, record: LoggedEvent) -> None:
        self.record = record
        self._payload: dict[str, Any] | None = None
        self._text: str | None = None
        self._chunk: bytes | None = None

    @property
    def payload(self) -> dict[str, Any]:
        """The parsed data of the event."""
        if self._payload is None:
            self._payload = self.record.payload()
        return self._payload

    @property
    def text(self) -> str:
        """The event as a WebSocket frame."""
        if self._text is None:
            record = self.record
            frame = _EncodedEvent(
                event=record.type,
                id=record.id,
                seq=record.seq,
                ts=record.ts,
                data=msgspec.Raw(record.data),
                actor={"type": record.actor_type, "id": record.actor_id},
            )
            self._text = encode(frame).decode()
        return self._text

    @property
    def sse_block(self) -> bytes:
        """The event as an SSE block."""
        if self._chunk is None:
            self._chunk = f"id: {self.record.seq}\nevent: {self.record.type}\ndata: {self.text}\n\n".encode()
        return self._chunk


class NoticeFrame:
    """A frame other than an event, for example `NoticeFrame("pong", ts=…)`."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: str, **members: Any) -> None:
        self.kind = kind
        self.text = encode({"type": kind, **members}).decode()

    @property
    def sse_block(self) -> bytes:
        """The notice as an SSE block. It has no id, so the client's cursor stays at the last event."""
        return f"event: {self.kind}\ndata: {self.text}\n\n".encode()


class CloseFrame:
    """A WebSocket close code and its reason, which end a connection."""

    __slots__ = ("code", "reason")

    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason


def format_expiry(expires_at: float | None) -> str | None:
    """Format the expiry time of a credential. Return None if the credential does not expire."""
    return None if expires_at is None else clock.format_instant(expires_at)


INVALID, UNAUTHENTICATED, FORBIDDEN, TOO_SLOW, TOO_MANY = 4400, 4401, 4403, 4408, 4429
TOO_BIG, RESTARTING = 1009, 1012
