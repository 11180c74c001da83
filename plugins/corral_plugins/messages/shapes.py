"""The request and response bodies of the message routes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, line
from corral_plugins.messages.api import Channel, Correlation, MessageType

Status = Literal["sent", "delivered", "read", "acked", "expired"]
Result = Literal["done", "rejected"]


class ReceiptView(msgspec.Struct, kw_only=True):
    """The state of a message for one recipient.

    Either `agent_id` or `user_id` is set. `redeliveries` is the number of times that an unacknowledged request was
    delivered again.
    """

    agent_id: str | None
    user_id: str | None
    status: Status
    delivered_at: Instant | None
    read_at: Instant | None
    acked_at: Instant | None
    result: Result | None
    note: str | None
    redeliveries: int


class MessageItem(msgspec.Struct, kw_only=True):
    """A message in a list.

    `status` is the least advanced status among the recipients, in the order `sent`, `delivered`, `read`, `acked`,
    `expired`. `trust` is `trusted` if a person wrote the message. `hops` is 0 for a message that is not a reply, and
    otherwise one more than the `hops` of the message to which it replies.
    """

    id: str
    created_at: Instant
    created_by: str | None
    sender_agent_id: str | None
    sender_user_id: str | None
    sender_name: str
    recipient_agent_id: str | None
    recipient_user_id: str | None
    channel: str | None
    subject: str
    body: str
    type: MessageType
    in_reply_to: str | None
    thread_id: str
    correlation: Correlation
    expires_at: Instant
    hops: int
    trust: Literal["trusted", "untrusted"]
    status: Status


class MessageView(MessageItem, kw_only=True):
    """A message with its receipts, one for each recipient."""

    receipts: list[ReceiptView]


class SentMessageView(MessageView, kw_only=True):
    """A message that has just been sent.

    `warnings` contains `recipient_offline` if the recipient agent cannot currently claim tasks, and `no_subscribers` if
    no agent other than the sender subscribes to the channel.
    """

    warnings: list[str]


class MessageQuery(PageQuery, kw_only=True):
    """Filters for listing messages.

    `agent_id` selects messages that this agent sent or received. `unread` selects messages that the caller, or the
    agent `agent_id`, has not read (true) or has read (false). `search` matches text in subjects and bodies.
    """

    agent_id: Id | UnsetType = UNSET
    channel: list[Channel] | UnsetType = UNSET
    unread: bool | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET
    type: list[MessageType] | UnsetType = UNSET
    thread_id: Id | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class ThreadQuery(PageQuery, kw_only=True):
    """The page of a thread to return. Messages are sorted oldest first."""


class InboxQuery(PageQuery, kw_only=True):
    """Selects messages in an agent's inbox, oldest first.

    `unread` excludes messages that the agent has read. If `peek` is set, the messages are not marked as delivered.
    """

    limit: Annotated[int, Meta(ge=1, le=50)] = 50
    unread: bool = True
    peek: bool = False


class ReadMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request to mark a message as read.

    `agent_id` is the agent on whose behalf a person acts. It is required if several recipient agents belong to the
    person.
    """

    agent_id: Id | None = None


class AcknowledgeMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The acknowledgement of a message.

    `agent_id` is the agent on whose behalf a person acts. It is required if several recipient agents belong to the
    person.
    """

    result: Result
    note: Annotated[str, Meta(max_length=4000)] | None = None
    agent_id: Id | None = None


class AgentChannels(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The channels to which an agent subscribes."""

    channels: Annotated[list[Channel], Meta(max_length=50)]


class ChannelView(msgspec.Struct, kw_only=True):
    """A channel with the ids of its subscribers, and the number of its messages in the last 24 hours."""

    channel: str
    subscribers: list[str]
    messages_24h: int
    last_message_at: Instant | None


class ChannelList(msgspec.Struct, kw_only=True):
    """At most 1,000 channels that have subscribers or messages, sorted by name."""

    items: list[ChannelView]
