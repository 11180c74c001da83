"""Sends messages: checks the sender and the recipients, enforces limits, and creates a receipt for each recipient."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.database.dialect import advisory_lock
from corral.errors import Forbidden, Invalid, TooMany
from corral.ids import new_id
from corral.plugin import Settings
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.messages import settings as declared
from corral_plugins.messages.api import BODY_BYTES, Correlation, MessageAcknowledged, MessageSent, NewMessage
from corral_plugins.messages.models import OPEN, ChannelRow, Message, Receipt, Subscription
from corral_plugins.messages.service import rows
from corral_plugins.messages.service.metrics import MessageMetrics
from corral_plugins.tasks.api import Tasks
from corral_plugins.workflows.api import Workflows

MAX_SUBSCRIBERS = 500
MAX_PER_MINUTE = 600
"""The maximum number of messages that a sender may send to all recipients together in one minute."""
SHORTEST_SECONDS, LONGEST_SECONDS = 60, 90 * 86_400
EXPECT_ACK = ("request", "handoff")
RECIPIENTS = ("recipient_agent_id", "recipient_user_id", "channel")

# Control characters except tab, line feed and carriage return; marks, embeddings, overrides and isolates of the
# bidirectional algorithm, with which a text can look different from what a model reads.
_REMOVED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """The sender of a message: an agent or a person."""

    agent_id: str | None
    user_id: str | None
    name: str
    trusted: bool

    @property
    def key(self) -> str:
        """The sender as a string, which identifies the sender when rate limits are checked."""
        return f"agent:{self.agent_id}" if self.agent_id is not None else f"user:{self.user_id}"


class MessageSending:
    """Sends messages. Every method runs in the caller's unit of work."""

    tasks: Tasks | None
    workflows: Workflows | None

    def __init__(self, settings: Settings, agents: Agents, accounts: Accounts, metrics: MessageMetrics) -> None:
        self._settings, self._agents, self._accounts, self._metrics = settings, agents, accounts, metrics

    def send(
        self, new: NewMessage, *, by: Principal, trusted: bool | None = None, cause: tuple[str, ...] | None = None
    ) -> tuple[Message, list[str]]:
        """Send a message. Return the message, and warnings about the recipient. Implements `Messages.send`."""
        sender = self._sender_of(new, by, trusted)
        parent = _find_parent(new)
        self._check_hops(parent)
        row = self._new_row(new, sender, parent, by)
        recipients, warnings = self._recipients_of(new, sender, row)
        self._check_rates(row)
        row.save(force_insert=True)
        self._insert_receipts(row, recipients)
        if row.channel is not None:
            _record_channel(row.channel, row.created_at)
        causes = cause if cause is not None else rows.causes_of(self.tasks, by)
        if parent is not None:
            acknowledge_by_reply(row, causes)
        self._metrics.count_sent(row.type)
        rows.publish_message_event(MessageSent, row, causes)
        return row, warnings

    # -- sender

    def _sender_of(self, new: NewMessage, by: Principal, trusted: bool | None) -> Sender:
        """Return the sender of a message.

        Raise `Forbidden` if the caller is not allowed to send on behalf of the given sender agent.
        """
        is_person = by.kind in ("user", "api_key")
        agent_id = (new.sender_agent_id or by.agent_id or "").lower() or None
        trust = is_person if trusted is None else trusted
        if agent_id is None:
            person = self._accounts.get(by.user_id) if by.user_id is not None else None
            name = "system" if person is None else person.full_name or person.email
            return Sender(agent_id=None, user_id=by.user_id, name=name, trusted=trust)
        if by.agent_id is not None and agent_id != by.agent_id:
            raise Forbidden("An agent can send messages only as itself; leave sender_agent_id out.")
        agent = self._find_sending_agent(agent_id, by)
        return Sender(agent_id=agent_id, user_id=by.user_id if is_person else None, name=agent.name, trusted=trust)

    def _find_sending_agent(self, agent_id: str, by: Principal) -> AgentFacts:
        """Return the agent that sends the message.

        Raise `Forbidden` if the caller is not allowed to send on its behalf.
        """
        agent = self._find_agent(agent_id, "/sender_agent_id")
        if by.agent_id is None and by.kind != "system" and not by.is_admin and agent.owner_id != by.user_id:
            raise Forbidden("Only the owner of an agent or an admin may send messages as the agent.")
        return agent

    def check_agents(self, fields: Mapping[str, Any], *, by: Principal) -> None:
        """Raise a `Problem` if the fields of a message name agents that the caller cannot use.

        The agents must exist, and the caller must be allowed to send on behalf of the sender agent.
        """
        if (sender := fields.get("sender_agent_id")) is not None:
            self._find_sending_agent(sender, by)
        if (recipient := fields.get("recipient_agent_id")) is not None:
            self._find_agent(recipient, "/recipient_agent_id")

    def _find_agent(self, agent_id: str, pointer: str) -> AgentFacts:
        found = self._agents.find(agent_id.lower())
        if found is None:
            raise _unknown_reference_error(pointer, "No agent has this id.")
        return found

    # -- the message

    def _new_row(self, new: NewMessage, sender: Sender, parent: Message | None, by: Principal) -> Message:
        message_id, channel = new_id(), new.channel
        agent_id = new.recipient_agent_id.lower() if new.recipient_agent_id is not None else None
        user_id = new.recipient_user_id.lower() if new.recipient_user_id is not None else None
        return Message(
            id=message_id,
            created_at=clock.now(),
            created_by=by.user_id,
            sender=sender.key,
            sender_agent_id=sender.agent_id,
            sender_user_id=sender.user_id,
            sender_name=sender.name,
            recipient=_recipient_key(agent_id, user_id, channel),
            recipient_agent_id=agent_id,
            recipient_user_id=user_id,
            channel=channel,
            subject=_REMOVED.sub("", new.subject),
            body=_clean_body(new.body),
            type=new.type or ("info" if parent is None else "reply"),
            in_reply_to=None if parent is None else parent.id,
            thread_id=message_id if parent is None else parent.thread_id,
            correlation=msgspec.to_builtins(self._correlation_of(new, by)),
            expires_at=self._expiry_of(new),
            hops=0 if parent is None else parent.hops + 1,
            trust="trusted" if sender.trusted else "untrusted",
        )

    def _expiry_of(self, new: NewMessage) -> str:
        if new.expires_at is None:
            return clock.now(self._settings.get(declared.DEFAULT_TTL))
        asked = clock.from_datetime(new.expires_at)
        if asked < clock.now(SHORTEST_SECONDS):
            raise Invalid.at("/expires_at", "in_the_past", f"must be at least {SHORTEST_SECONDS} seconds from now")
        if asked > clock.now(LONGEST_SECONDS):
            raise Invalid.at("/expires_at", "too_large", "must be at most 90 days from now")
        return asked

    def _correlation_of(self, new: NewMessage, by: Principal) -> Correlation:
        if new.correlation is None:
            return Correlation(task_id=by.task_id)
        given = new.correlation
        if given.session_id is not None:
            raise Invalid.at(
                "/correlation/session_id", "not_allowed", "Collaboration sessions do not exist; leave out session_id."
            )
        task_id = given.task_id.lower() if given.task_id is not None else None
        run_id = given.run_id.lower() if given.run_id is not None else None
        if task_id is not None and (self.tasks is None or self.tasks.find_run(task_id) is None):
            raise _unknown_reference_error("/correlation/task_id", "No task has this id.")
        if run_id is not None and (self.workflows is None or self.workflows.find_run(run_id) is None):
            raise _unknown_reference_error("/correlation/run_id", "No workflow run has this id.")
        return Correlation(task_id=task_id, run_id=run_id)

    # -- recipients

    def _recipients_of(self, new: NewMessage, sender: Sender, row: Message) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the recipients of a message, each as column values for its receipt, and warnings about them.

        Raise `Invalid` unless the message has exactly one recipient, which must exist and must not be the sender.
        """
        given = [name for name in RECIPIENTS if getattr(new, name) is not None]
        if len(given) != 1:
            detail = f"Set exactly one of {', '.join(RECIPIENTS)}."
            pointer = f"/{given[1] if given else RECIPIENTS[0]}"
            raise Invalid.at(pointer, "not_allowed" if given else "required", detail)
        if row.recipient == row.sender:
            raise _unknown_reference_error(f"/{given[0]}", "A message cannot be sent to its sender.")
        if row.channel is not None:
            found = sorted(self._agents.find_many(_subscribers(row.channel, without=sender.agent_id)))
            return [{"agent_id": each} for each in found], ([] if found else ["no_subscribers"])
        if row.recipient_agent_id is not None:
            agent = self._find_agent(row.recipient_agent_id, "/recipient_agent_id")
            return [{"agent_id": agent.id}], ([] if agent.can_claim else ["recipient_offline"])
        person = self._accounts.get_many([row.recipient_user_id]).get(row.recipient_user_id)
        if person is None or not person.is_active:
            raise _unknown_reference_error("/recipient_user_id", "No active user has this id.")
        return [{"user_id": person.id}], []

    def _insert_receipts(self, row: Message, recipients: Sequence[dict[str, Any]]) -> None:
        shared = {
            "message_id": row.id,
            "thread_id": row.thread_id,
            "expects_ack": row.type in EXPECT_ACK,
            "rank": 0 if row.type == "request" else 1,
            "status": "sent",
            "created_at": row.created_at,
            "expires_at": row.expires_at,
            "redeliveries": 0,
        }
        receipts = [
            {
                **shared,
                "id": new_id(),
                "agent_id": each.get("agent_id"),
                "user_id": each.get("user_id"),
                "due_at": row.created_at if "agent_id" in each else None,
            }
            for each in recipients
        ]
        for start in range(0, len(receipts), 100):
            Receipt.insert_many(receipts[start : start + 100]).execute()

    # -- limits

    def _check_hops(self, parent: Message | None) -> None:
        limit = self._settings.get(declared.MAX_HOPS)
        if parent is not None and parent.hops + 1 > limit:
            raise Invalid.at(
                "/in_reply_to",
                "not_allowed",
                f"The thread has more than {limit} replies in a row (messages.max_hops); start a new thread.",
                problem="hop_limit",
            )

    def _check_rates(self, row: Message) -> None:
        """Raise `TooMany` if the sender exceeds a rate limit for this recipient or for all recipients.

        Both limits apply to the last minute.
        """
        advisory_lock(f"messages:{row.sender}")
        sent: Any = (
            Message.select(Message.created_at, Message.recipient)
            .where((Message.sender == row.sender) & (Message.created_at > clock.now(-60)))
            .order_by(Message.created_at)
            .limit(MAX_PER_MINUTE)
            .tuples()
        )
        instants = [(at, to) for at, to in sent]
        to_same = [at for at, to in instants if to == row.recipient and row.channel is None]
        limit = self._settings.get(declared.PAIR_PER_MINUTE)
        if len(to_same) >= limit:
            raise _too_many_error(f"At most {limit} messages a minute can go to one recipient", to_same[-limit])
        if len(instants) >= MAX_PER_MINUTE:
            raise _too_many_error(f"A sender can send at most {MAX_PER_MINUTE} messages a minute", instants[0][0])


def acknowledge_by_reply(reply: Message, cause: tuple[str, ...] | None) -> None:
    """Acknowledge, with the result `done`, the requests that the sender of the reply received in the same thread.

    `cause` lists the ids of the triggers and tasks that led to the reply.
    """
    by_agent = reply.sender_agent_id is not None
    if not by_agent and reply.sender_user_id is None:  # the system is no recipient, and NULL would match every agent's
        return
    asked = (
        (Receipt.thread_id == reply.thread_id)
        & (Receipt.agent_id == reply.sender_agent_id if by_agent else Receipt.user_id == reply.sender_user_id)
        & Receipt.expects_ack
        & Receipt.status.in_(OPEN)
        & (Receipt.expires_at > clock.now())
    )
    found = [each.message_id for each in Receipt.select(Receipt.message_id).where(asked).limit(100)]
    messages = rows.lock_messages(found)
    if not messages:
        return
    now = clock.now()
    changes: dict[Any, Any] = {
        Receipt.status: "acked",
        Receipt.acked_at: now,
        Receipt.result: "done",
        Receipt.due_at: None,
        Receipt.read_at: _or_now(Receipt.read_at, now),
        Receipt.delivered_at: _or_now(Receipt.delivered_at, now),
    }
    answered = Receipt.update(changes).where(asked & Receipt.message_id.in_(list(messages)))
    for each in list(answered.returning(Receipt).execute()):
        by = rows.recipient_of(each)
        rows.publish_message_event(MessageAcknowledged, messages[each.message_id], cause, by=by, result="done")
    rows.refresh_status(list(messages))


def _or_now(column: Any, now: str) -> Any:
    return peewee.fn.COALESCE(column, now)


def _find_parent(new: NewMessage) -> Message | None:
    if new.in_reply_to is None:
        return None
    found: Message | None = Message.get_or_none(Message.id == new.in_reply_to.lower())
    if found is None:
        raise _unknown_reference_error("/in_reply_to", "No message has this id.")
    return found


def _clean_body(text: str) -> str:
    clean = _REMOVED.sub("", text)
    if not clean:
        raise Invalid.at("/body", "too_short", "must contain a character other than control characters")
    if len(clean.encode()) > BODY_BYTES:
        raise Invalid.at("/body", "too_long", "at most 64 KiB")
    return clean


def _recipient_key(agent_id: str | None, user_id: str | None, channel: str | None) -> str:
    if agent_id is not None:
        return f"agent:{agent_id}"
    return f"user:{user_id}" if user_id is not None else f"channel:{channel}"


def _subscribers(channel: str, *, without: str | None) -> list[str]:
    """Return the ids of the agents that subscribe to a channel, excluding the agent `without`.

    Raise `Invalid` if there are more than 500.
    """
    found: Any = (
        Subscription.select(Subscription.agent_id)
        .where(Subscription.channel == channel)
        .order_by(Subscription.agent_id)
        .limit(MAX_SUBSCRIBERS + 2)
        .tuples()
    )
    ids = [agent_id for (agent_id,) in found if agent_id != without]
    if len(ids) > MAX_SUBSCRIBERS:
        raise Invalid.at("/channel", "too_large", f"at most {MAX_SUBSCRIBERS} agents may subscribe to the channel")
    return ids


def _record_channel(name: str, now: str) -> None:
    ChannelRow.insert(name=name, last_message_at=now).on_conflict(
        conflict_target=[ChannelRow.name], update={ChannelRow.last_message_at: now}
    ).execute()


def _unknown_reference_error(pointer: str, detail: str) -> Invalid:
    return Invalid.at(pointer, "unknown_reference", detail, problem="unknown_reference")


def _too_many_error(sentence: str, oldest: str) -> TooMany:
    """Return the error for a sender that exceeds a limit per minute.

    `sentence` describes the limit. `oldest` is the time of the oldest message in that minute.
    """
    wait = max(1, math.ceil(clock.parse_instant(oldest) + 60 - clock.time_s()))
    return TooMany(f"{sentence}; wait {wait} s.", retry_after=wait)
