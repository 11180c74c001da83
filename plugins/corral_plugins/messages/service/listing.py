"""Lists messages, threads, channels and inboxes, and sets the channels to which an agent subscribes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import peewee
from msgspec import UNSET
from peewee import SQL

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import Forbidden, NotFound
from corral.http.page import Order, Page, newest_first, paginate
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.messages.models import OPEN, ChannelRow, Message, Receipt, Subscription
from corral_plugins.messages.service import rows
from corral_plugins.messages.service.delivery import MessageDelivery, untrusted_sources
from corral_plugins.messages.shapes import (
    AgentChannels,
    ChannelList,
    ChannelView,
    InboxQuery,
    MessageItem,
    MessageQuery,
    MessageView,
    ThreadQuery,
)
from corral_plugins.tasks.api import Tasks

MAX_CHANNELS = 1000
UNREAD = ("sent", "delivered")
_OLDEST_FIRST = (Order(Message.created_at, descending=False), Order(Message.id, descending=False))


class MessageListing:
    """Reads messages. Every method runs in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, agents: Agents, delivery: MessageDelivery) -> None:
        self._agents, self._delivery = agents, delivery

    def get(self, message_id: str, *, by: Principal) -> MessageView:
        """Return a message with its receipts. Raise `NotFound` if no such message is visible to the caller."""
        return rows.view_of(rows.find_readable_message(message_id, by))

    def list(self, query: MessageQuery, *, by: Principal) -> Page[MessageItem]:
        """Return a page of the messages that match every filter, newest first."""
        found = Message.select().where(visible(Message, by), *_filters(query, by))
        return paginate(found, query, by, scope="messages", order=newest_first(Message), make=rows.item_of)

    def thread(self, thread_id: str, query: ThreadQuery, *, by: Principal) -> Page[MessageItem]:
        """Return a page of a thread's messages, oldest first. Raise `NotFound` if the thread has no messages."""
        found = Message.select().where((Message.thread_id == thread_id) & visible(Message, by))
        page = paginate(found, query, by, scope=f"thread:{thread_id}", order=_OLDEST_FIRST, make=rows.item_of)
        if not page.total:
            raise NotFound("There is no thread with this id.")
        return page

    # -- inbox

    def inbox(self, agent_id: str, query: InboxQuery, *, by: Principal) -> Page[MessageItem]:
        """Return a page of an agent's inbox, oldest first.

        If the agent itself reads its inbox without `query.peek`, the messages on the page are delivered. With or
        without `query.peek`, the run that reads the messages is tainted, unless the requester of its task wrote all of
        them.

        Raise `Forbidden` if another agent reads the inbox without `query.peek`, and `NotFound` if there is no such
        agent.
        """
        self._find_agent(agent_id)
        if by.agent_id is not None and by.agent_id != agent_id and not query.peek:
            raise Forbidden("An agent can read another agent's inbox only with peek=true.")
        states = UNREAD if query.unread else (*OPEN, "acked")
        shown = (
            (Receipt.agent_id == agent_id)
            & Receipt.status.in_(states)
            & ((Receipt.expires_at > clock.now()) | (Receipt.status == "acked"))
        )
        found = Message.select().where(
            Message.id.in_(Receipt.select(Receipt.message_id).where(shown)) & visible(Message, by)
        )
        scope = f"inbox:{agent_id}"
        if by.agent_id is not None:
            page = paginate(found, query, by, scope=scope, order=_OLDEST_FIRST, make=lambda row: row)
            self._taint_run(page.items, by)
            if not query.peek:
                self._delivery.deliver_now(agent_id, [str(row.id) for row in page.items], lease_id=by.lease_id)
        return paginate(found, query, by, scope=scope, order=_OLDEST_FIRST, make=rows.item_of)

    def _taint_run(self, messages: Sequence[Message], by: Principal) -> None:
        """Taint the run that reads the messages, unless the requester of the run's task wrote all of them."""
        run = None if self.tasks is None or by.task_id is None else self.tasks.find_run(by.task_id)
        if self.tasks is None or run is None or by.lease_id is None:
            return
        if sources := untrusted_sources(messages, run.requester_id):
            self.tasks.taint_run(run.task_id, by.lease_id, sources)

    # -- channels

    def channels(self) -> ChannelList:
        """Return the first 1,000 channels that have subscribers or messages, sorted by name."""
        names: Any = ChannelRow.select(ChannelRow.name).union(Subscription.select(Subscription.channel))
        found = sorted(name for (name,) in list(names.order_by(SQL("1")).limit(MAX_CHANNELS).tuples()))
        last = {row.name: row.last_message_at for row in ChannelRow.select().where(ChannelRow.name.in_(found))}
        subscribers: dict[str, list[str]] = defaultdict(list)
        of_channels = Subscription.select().where(Subscription.channel.in_(found)).order_by(Subscription.agent_id)
        for each in of_channels:
            subscribers[each.channel].append(each.agent_id)
        recent: Any = (
            Message.select(Message.channel, peewee.fn.COUNT(Message.id))
            .where(Message.channel.in_(found) & (Message.created_at > clock.now(-86_400)))
            .group_by(Message.channel)
        )
        counts = dict(list(recent.tuples()))
        return ChannelList(
            items=[
                ChannelView(
                    channel=name,
                    subscribers=subscribers[name],
                    messages_24h=counts.get(name, 0),
                    last_message_at=last.get(name),
                )
                for name in found
            ]
        )

    def set_subscriptions(self, agent_id: str, wanted: AgentChannels, *, by: Principal) -> AgentChannels:
        """Replace the channels to which an agent subscribes. Only the agent, its owner and admins may do this.

        Raise `Forbidden` for any other caller, and `NotFound` if there is no such agent.
        """
        agent = self._find_agent(agent_id)
        if by.agent_id is None:
            require_owner(by, agent.owner_id, what="agent")
        elif by.agent_id != agent_id:
            raise Forbidden("An agent can change only its own channel subscriptions.")
        names = sorted(set(wanted.channels))
        Subscription.delete().where((Subscription.agent_id == agent_id) & Subscription.channel.not_in(names)).execute()
        if names:
            new = [{"channel": name, "agent_id": agent_id} for name in names]
            Subscription.insert_many(new).on_conflict_ignore().execute()
        return AgentChannels(channels=names)

    def _find_agent(self, agent_id: str) -> AgentFacts:
        found = self._agents.find(agent_id)
        if found is None:
            raise NotFound("There is no agent with this id.")
        return found


def _filters(query: MessageQuery, by: Principal) -> list[Any]:
    found: list[Any] = []
    agent_id = query.agent_id.lower() if query.agent_id is not UNSET else None
    if agent_id is not None:
        received = Receipt.select(Receipt.message_id).where(Receipt.agent_id == agent_id)
        found.append((Message.sender == f"agent:{agent_id}") | Message.id.in_(received))
    if query.unread is not UNSET:
        states = UNREAD if query.unread else ("read", "acked")
        mine = _receipts_of(agent_id or by.agent_id, by.user_id) & Receipt.status.in_(states)
        if query.unread:
            mine &= Receipt.expires_at > clock.now()
        found.append(Message.id.in_(Receipt.select(Receipt.message_id).where(mine)))
    if query.channel is not UNSET:
        found.append(Message.channel.in_(query.channel))
    if query.type is not UNSET:
        found.append(Message.type.in_(query.type))
    if query.thread_id is not UNSET:
        found.append(Message.thread_id == query.thread_id.lower())
    if query.since is not UNSET:
        found.append(Message.created_at >= clock.from_datetime(query.since))
    if query.search is not UNSET:
        found.append(Message.subject.contains(query.search) | Message.body.contains(query.search))
    if query.status is not UNSET:
        found.append(_has_status(set(query.status)))
    return found


def _receipts_of(agent_id: str | None, user_id: str | None) -> Any:
    return Receipt.agent_id == agent_id if agent_id is not None else Receipt.user_id == user_id


def _has_status(wanted: set[str]) -> Any:
    """Return an SQL condition that selects messages with one of these statuses.

    A message counts as expired as soon as its expiry time has passed, even if its stored status has not been updated.
    """
    condition: Any = Message.status.in_(sorted(wanted - set(OPEN)))
    condition |= Message.status.in_(sorted(wanted & set(OPEN))) & (Message.expires_at > clock.now())
    if "expired" in wanted:
        condition |= Message.status.in_(OPEN) & (Message.expires_at <= clock.now())
    return condition
