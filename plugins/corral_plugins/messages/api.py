"""The public interface of the `messages` plugin: data types, events and the `Messages` service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.events.event import Event
from corral.schema.fields import Id, MomentIn, line, text_format

declare_codes(
    {
        "hop_limit": (
            422,
            "The message has been answered too often",
            "The chain of replies is longer than messages.max_hops allows. Start a new thread to continue the "
            "conversation.",
        ),
    }
)

MessageType = Literal["info", "request", "reply", "handoff", "alert"]
MESSAGE_TYPES: tuple[MessageType, ...] = ("info", "request", "reply", "handoff", "alert")

CHANNEL = r"^[a-z0-9][a-z0-9._-]{0,63}(?![\s\S])"
Channel = Annotated[
    str, text_format(CHANNEL, "1 to 64 characters of a-z, 0-9, ., _ and -, beginning with a letter or digit")
]
BODY_BYTES = 65_536


class Correlation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The objects that a message is about."""

    task_id: Id | None = None
    run_id: Id | None = None
    session_id: Id | None = None


class NewMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message to send. It has exactly one recipient: an agent, a user or a channel.

    `sender_agent_id` is the agent on whose behalf the caller sends the message. If it is null, the caller is the
    sender. `type` defaults to `reply` if `in_reply_to` is set, and to `info` otherwise. `correlation` defaults to the
    task of the caller's lease.
    """

    body: Annotated[str, Meta(min_length=1, max_length=BODY_BYTES)]
    sender_agent_id: Id | None = None
    recipient_agent_id: Id | None = None
    recipient_user_id: Id | None = None
    channel: Channel | None = None
    subject: Annotated[str, line(200, 0)] = ""
    type: MessageType | None = None
    in_reply_to: Id | None = None
    correlation: Correlation | None = None
    expires_at: MomentIn | None = None


class SentMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The result of sending a message.

    `warnings` contains `recipient_offline` if the recipient agent cannot currently claim tasks, and `no_subscribers` if
    no agent other than the sender subscribes to the channel.
    """

    id: str
    thread_id: str
    warnings: list[str]


class ClaimedMessages(msgspec.Struct, frozen=True, kw_only=True):
    """The messages for an agent that claims a task, as JSON objects.

    `untrusted` contains `message:<id>` for each untrusted message.
    """

    items: list[dict[str, Any]]
    untrusted: tuple[str, ...]


NO_MESSAGES = ClaimedMessages(items=[], untrusted=())


class Messages(Protocol):
    """The service for messages. Every method runs in the caller's unit of work."""

    def send(
        self, new: NewMessage, *, by: Principal, trusted: bool | None = None, cause: tuple[str, ...] | None = None
    ) -> SentMessage:
        """Send a message. The caller must have redacted its subject and body.

        `trusted` states whether a person wrote the message. By default, it is true if `by` is a person. `cause` lists
        the ids of the triggers and tasks that led to the message, by default of those that led to the caller's task.
        Raise a `Problem` with the code `unknown_reference`, `hop_limit` or `rate_limited`, or `Forbidden` if the caller
        is not allowed to send on behalf of the sender.
        """
        ...

    def for_claim(self, agent_id: str, *, lease_id: str, requester_id: str | None) -> ClaimedMessages:
        """Deliver an agent's waiting messages to the attempt with this lease.

        Requests are delivered first, and older messages before newer ones. Messages are untrusted unless the requester
        of the task wrote them.
        """
        ...

    def put_back(self, lease_id: str) -> None:
        """Put messages that were delivered under this lease back into the queue, because the attempt did not complete.

        Messages that were acknowledged, or that were read after their first delivery, are not changed.
        """
        ...

    def texts(self, message_ids: Iterable[str]) -> dict[str, str]:
        """Return the subjects and bodies of messages, keyed by message id, without checking permissions.

        Unknown ids are omitted.
        """
        ...


class MessageEvent(Event, kw_only=True):
    """The fields that all message events share. No event contains the text of a message."""

    message_id: str
    thread_id: str
    sender_agent_id: str | None
    sender_user_id: str | None
    recipient_agent_id: str | None
    recipient_user_id: str | None
    channel: str | None
    type: str
    subject: str


class MessageSent(MessageEvent, kw_only=True):
    """A message was sent."""

    event = "message.new"


class MessageRead(MessageEvent, kw_only=True):
    """A recipient read a message. `by` is the recipient."""

    event = "message.read"

    by: dict[str, str]


class MessageAcknowledged(MessageEvent, kw_only=True):
    """A recipient acknowledged a message, or a message that expects an acknowledgement expired without one.

    `by` is the recipient, and `result` is `done`, `rejected` or `expired`.
    """

    event = "message.acked"

    by: dict[str, str]
    result: str


class MessageDeleted(MessageEvent, kw_only=True):
    """A message was deleted before anyone read it."""

    event = "message.deleted"


EVENTS: tuple[type[Event], ...] = (MessageSent, MessageRead, MessageAcknowledged, MessageDeleted)
