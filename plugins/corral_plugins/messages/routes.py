"""The HTTP routes for messages."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.messages.api import NewMessage
from corral_plugins.messages.service import rows
from corral_plugins.messages.service.listing import MessageListing
from corral_plugins.messages.service.receipts import MessageReceipts
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.messages.shapes import (
    AcknowledgeMessage,
    AgentChannels,
    ChannelList,
    InboxQuery,
    MessageItem,
    MessageQuery,
    MessageView,
    ReadMessage,
    SentMessageView,
    ThreadQuery,
)

routes = Routes("/messages", tag="Messages")
agent_routes = Routes("/agents", tag="Messages")
READ, WRITE = "messages.read", "messages.write"


@routes.get("/", needs=READ, raises=("invalid_cursor",))
def list_messages(query: MessageQuery, messages: MessageListing, caller: Principal) -> Page[MessageItem]:
    """List messages, newest first."""
    return messages.list(query, by=caller)


@routes.post(
    "/send",
    needs=WRITE,
    status=201,
    redacted=True,
    delegable=True,
    raises=("unknown_reference", "hop_limit", "forbidden"),
)
def send_message(body: NewMessage, sending: MessageSending, caller: Principal) -> Answer[SentMessageView]:
    """Send a message to an agent, a user or a channel.

    A message to a channel is delivered to the agents that are subscribed when it is sent, except the sender.
    """
    row, warnings = sending.send(body, by=caller)
    view = SentMessageView(**_view_fields(rows.view_of(row)), warnings=warnings)
    return Answer(body=view, headers={"Location": f"/api/v1/messages/{row.id}"})


@routes.get("/channels", needs=READ)
def list_channels(messages: MessageListing) -> ChannelList:
    """List the channels that have subscribers or messages."""
    return messages.channels()


@routes.get("/threads/{thread_id}", needs=READ, raises=("not_found", "invalid_cursor"))
def list_thread(thread_id: str, query: ThreadQuery, messages: MessageListing, caller: Principal) -> Page[MessageItem]:
    """List the messages of a thread, oldest first."""
    return messages.thread(thread_id, query, by=caller)


@routes.get("/{id}", needs=READ, raises=("not_found",))
def get_message(id: str, messages: MessageListing, caller: Principal) -> MessageView:
    """Get a message with its receipts."""
    return messages.get(id, by=caller)


@routes.patch(
    "/{id}/read",
    needs=WRITE,
    delegable=True,
    raises=("not_found", "forbidden", "invalid_state", "unknown_reference"),
)
def mark_message_read(id: str, body: ReadMessage, receipts: MessageReceipts, caller: Principal) -> MessageView:
    """Mark a message as read. Marking it again changes nothing.

    The owner of a recipient agent, or an admin, may do this on behalf of the agent.
    """
    return receipts.mark_read(id, body.agent_id, by=caller)


@routes.post(
    "/{id}/ack",
    needs=WRITE,
    redacted=True,
    delegable=True,
    raises=("not_found", "forbidden", "invalid_state", "unknown_reference", "already_decided"),
)
def acknowledge_message(id: str, body: AcknowledgeMessage, receipts: MessageReceipts, caller: Principal) -> MessageView:
    """Acknowledge a message by stating that its request is done or rejected. This also marks the message as read."""
    return receipts.acknowledge(id, body, by=caller)


@routes.delete("/{id}", needs=WRITE, raises=("not_found", "forbidden", "invalid_state"))
def delete_message(id: str, receipts: MessageReceipts, caller: Principal) -> None:
    """Delete a message that no recipient has read."""
    receipts.delete(id, by=caller)


@agent_routes.get(
    "/{id}/inbox", needs=READ, delegable=True, live=True, raises=("not_found", "forbidden", "invalid_cursor")
)
async def list_inbox(
    id: str, query: InboxQuery, messages: MessageListing, caller: Principal, request: Request, work: Work
) -> Page[MessageItem]:
    """List the messages in an agent's inbox, oldest first.

    If the agent itself reads its inbox without `peek`, the messages are marked as delivered. Reading by a person does
    not mark messages as delivered.
    """
    return await work(lambda: messages.inbox(id, query, by=caller), entry=request.unit_context(caller))


@agent_routes.put("/{id}/channels", needs=WRITE, delegable=True, raises=("not_found", "forbidden"))
def set_agent_channels(id: str, body: AgentChannels, messages: MessageListing, caller: Principal) -> AgentChannels:
    """Set the channels to which an agent subscribes."""
    return messages.set_subscriptions(id, body, by=caller)


def _view_fields(view: MessageView) -> dict[str, Any]:
    return {name: getattr(view, name) for name in view.__struct_fields__}
