"""Claims deliveries for attempts, dividing them fairly among webhooks and respecting the installation's limits.

A claim is a lease with a fencing token. Every method runs in the caller's unit of work.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.visibility import EventRights
from corral.database.dialect import advisory_lock
from corral.ids import new_id
from corral.plugin import Settings
from corral_core.accounts.api import Accounts
from corral_plugins.admin.api import KillSwitch
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.webhooks.models import IS_OPEN, Delivery, Webhook
from corral_plugins.webhooks.service.disabling import disable_webhooks, ended_columns
from corral_plugins.webhooks.service.fan_out import event_of
from corral_plugins.webhooks.settings import CONCURRENCY, PROBE_SECONDS, TIMEOUT_SECONDS

PER_HOST = 5
RESERVED = 5  # one in so many slots is kept for hosts that no attempt is sent to at the moment
LEASE_SECONDS, LEASE_MARGIN_SECONDS = 30, 15
MAX_CANDIDATES = 200
BREAKER = "webhook"


def breaker_name(host: str) -> str:
    """Return the name of a host's circuit breaker."""
    return f"{BREAKER}:{host}"


class ClaimedDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery that this process may attempt until its lease ends.

    A probe is an extra attempt that tests a failing webhook. Probes do not count as attempts in the retry schedule.
    """

    webhook: Webhook
    delivery: Delivery
    is_probe: bool
    timeout_seconds: int


class _RunningAttempts:
    """The attempts that are currently running in the whole installation."""

    def __init__(self, limit: int, webhooks: Iterable[tuple[str, str | None]]) -> None:
        self.limit, self.total = limit, 0
        self.webhooks, self.hosts = Counter[str](), Counter[str]()
        for webhook_id, host in webhooks:
            self.add(webhook_id, host or "")

    def add(self, webhook_id: str, host: str) -> None:
        self.total += 1
        self.webhooks[webhook_id] += 1
        self.hosts[host] += 1

    def admits(self, row: Webhook) -> bool:
        """Return whether another attempt for a webhook may start now.

        If the webhook's last attempt failed, or none has ever succeeded, the webhook is limited to one attempt at a
        time. A second attempt to the same host starts only if enough slots remain free for other hosts. Therefore,
        unresponsive hosts delay other hosts only if there are very many of them.
        """
        running = self.hosts[row.host]
        limit = self.limit if running == 0 else self.limit - self.limit // RESERVED
        most = PER_HOST if _is_healthy(row) else 1
        return self.total < limit and running < PER_HOST and self.webhooks[row.id] < most


class DeliveryClaims:
    """Claims and releases deliveries."""

    switch: KillSwitch | None
    breakers: Breakers | None

    def __init__(self, settings: Settings, accounts: Accounts, rights: EventRights) -> None:
        self._settings, self._accounts, self._rights = settings, accounts, rights

    def next_due_time(self) -> str | None:
        """Return the time of the next attempt or probe, or None if no delivery is waiting."""
        due: Any = Delivery.select(peewee.fn.MIN(Delivery.due_at)).where(Delivery.due_at.is_null(False)).scalar()
        if due is None:
            return None
        probe: Any = Webhook.select(peewee.fn.MIN(Webhook.next_probe_at)).where(Webhook.is_active).scalar()
        return str(min(due, probe) if probe and self._settings.get(PROBE_SECONDS) else due)

    def claim(self) -> list[ClaimedDelivery]:
        """Claim as many due deliveries as the limits allow.

        Deliveries about objects that the webhook's owner may no longer read are cancelled.
        """
        if self.switch is not None and (state := self.switch.state()).engaged and state.hold_deliveries:
            return []
        advisory_lock("webhooks.claim")  # so that the limits hold for all processes together
        load = _RunningAttempts(self._settings.get(CONCURRENCY), _running())
        webhooks = {row.id: row for row in self._admitted(load)}
        if not webhooks:
            return []
        readable = self._visible_to_owners(
            _first_waiting(webhooks.values(), self._settings.get(PROBE_SECONDS) > 0), webhooks
        )
        chosen = _take_turns(webhooks, readable, load)
        return self._lease_deliveries(chosen, webhooks)

    def release(self, claimed: ClaimedDelivery, due_at: str) -> None:
        """Release a delivery that was not attempted.

        The delivery is due again at `due_at`. If the attempt was a probe, the webhook's next probe is due at that time
        instead.
        """
        next_attempt_at = claimed.delivery.next_attempt_at if claimed.is_probe else due_at
        waits = {"next_attempt_at": next_attempt_at, "due_at": next_attempt_at, "lease": None, "lease_until": None}
        Delivery.update(waits).where(has_valid_claim(claimed.delivery)).execute()
        if claimed.is_probe:
            Webhook.update(next_probe_at=due_at).where(Webhook.id == claimed.webhook.id).execute()

    @staticmethod
    def has_expired() -> bool:
        """Return whether a process has ended without recording the result of a delivery."""
        return bool(Delivery.select().where(Delivery.lease_until <= clock.now()).limit(1).exists())

    def release_expired(self) -> int:
        """Release the deliveries claimed by processes that ended without recording a result.

        Return the number of released deliveries. If the attempt was a probe, the delivery keeps the time of its next
        regular attempt, and the probe is still due.
        """
        waits = {"due_at": Delivery.next_attempt_at, "lease": None, "lease_until": None}
        return int(Delivery.update(waits).where(Delivery.lease_until <= clock.now()).execute())

    def _candidates(self) -> list[Webhook]:
        """Return the active webhooks that have due deliveries or a due probe.

        Webhooks that have waited longest since their last claim come first.
        """
        now = clock.now()
        waiting = Delivery.select(peewee.SQL("1")).where(Delivery.webhook_id == Webhook.id)
        is_due = peewee.fn.EXISTS(waiting.where(Delivery.due_at <= now))
        is_probed = (Webhook.next_probe_at <= now) & peewee.fn.EXISTS(waiting.where(Delivery.due_at.is_null(False)))
        wanted = is_due | is_probed if self._settings.get(PROBE_SECONDS) else is_due
        rows = Webhook.select().where(Webhook.is_active & wanted)
        return list(rows.order_by(Webhook.claimed_at, Webhook.id).limit(MAX_CANDIDATES))

    def _admitted(self, load: _RunningAttempts) -> list[Webhook]:
        """Return the webhooks to which a message may be sent now, but no more than there are free slots."""
        found = self._candidates()
        admitted = [row for row in found if load.admits(row) and not self._is_blocked(row.host)]
        if len(found) == MAX_CANDIDATES:  # the others have to wait, so the next claim looks beyond them
            waiting = {row.id for row in found} - {row.id for row in admitted}
            Webhook.update(claimed_at=clock.now()).where(Webhook.id.in_(waiting)).execute()
        return admitted[: load.limit - load.total]

    def _is_blocked(self, host: str) -> bool:
        return self.breakers is not None and self.breakers.blocked_until(breaker_name(host)) is not None

    def _visible_to_owners(self, rows: list[Delivery], webhooks: Mapping[str, Webhook]) -> list[Delivery]:
        """Return the deliveries about objects that the webhooks' owners may still read. Cancel the others."""
        owners = self._accounts.principals_of(row.user_id for row in webhooks.values())
        gone = {row.user_id for row in webhooks.values()} - owners.keys()
        if gone:
            disable_webhooks(Webhook.user_id.in_(gone), "owner_inactive")
        rows = [row for row in rows if webhooks[row.webhook_id].user_id in owners]
        hidden = [
            row.id for row in rows if not self._rights.can_read(owners[webhooks[row.webhook_id].user_id], event_of(row))
        ]
        if hidden:
            Delivery.update(ended_columns("cancelled")).where(Delivery.id.in_(hidden) & IS_OPEN).execute()
        return [row for row in rows if row.id not in hidden]

    def _lease_deliveries(self, chosen: list[Delivery], webhooks: Mapping[str, Webhook]) -> list[ClaimedDelivery]:
        if not chosen:
            return []
        timeout, now, lease = self._settings.get(TIMEOUT_SECONDS), clock.now(), new_id()
        until = clock.now(max(LEASE_SECONDS, timeout + LEASE_MARGIN_SECONDS))
        free = Delivery.id.in_([row.id for row in chosen]) & Delivery.due_at.is_null(False)
        Webhook.update(claimed_at=now).where(Webhook.id.in_({row.webhook_id for row in chosen})).execute()
        leased = Delivery.update(due_at=None, lease=lease, lease_until=until).where(free).returning(Delivery.id)
        taken = {row.id for row in leased.execute()}
        for row in chosen:
            row.lease = lease
        return [
            ClaimedDelivery(
                webhook=webhooks[row.webhook_id],
                delivery=row,
                is_probe=row.due_at > now,
                timeout_seconds=timeout,
            )
            for row in chosen
            if row.id in taken  # the others were cancelled in the meantime
        ]


def _is_healthy(row: Webhook) -> bool:
    return row.failing_since is None and row.last_success_at is not None


def has_valid_claim(delivery: Delivery) -> Any:
    """Return an SQL condition that is true while the claim of a delivery is valid."""
    return (Delivery.id == delivery.id) & (Delivery.lease == delivery.lease)


def _running() -> list[tuple[str, str | None]]:
    """Return the webhook id and the host of every running attempt."""
    joined = Delivery.select(Delivery.webhook_id, Webhook.host).join(
        Webhook, peewee.JOIN.LEFT_OUTER, on=Webhook.id == Delivery.webhook_id
    )
    rows: Any = joined.where(Delivery.lease_until.is_null(False)).tuples()
    return list(rows)


def _first_waiting(webhooks: Iterable[Webhook], with_probes: bool) -> list[Delivery]:
    """Return the first due deliveries of each webhook.

    If a probe of a webhook is due, the webhook's next deliveries are returned even if they are not due yet.
    """
    now = clock.now()
    queries = []
    for row in webhooks:
        waiting = Delivery.select(Delivery.id, Delivery.due_at).where(Delivery.webhook_id == row.id)
        is_probed = with_probes and row.next_probe_at is not None and row.next_probe_at <= now
        until, most = (clock.LAST if is_probed else now), (PER_HOST if _is_healthy(row) else 1)
        first = waiting.where(Delivery.due_at <= until).order_by(Delivery.due_at, Delivery.id).limit(most)
        queries.append(Delivery.select(peewee.SQL("id")).from_(first.alias("waiting")))
    found: Any = functools.reduce(operator.add, queries)
    ids = [row[0] for row in found.tuples()]
    return list(Delivery.select().where(Delivery.id.in_(ids)).order_by(Delivery.id))


def _take_turns(webhooks: Mapping[str, Webhook], rows: list[Delivery], load: _RunningAttempts) -> list[Delivery]:
    """Choose deliveries in rounds until the limits are reached. Each round chooses one delivery per webhook."""
    queues: dict[str, list[Delivery]] = {webhook_id: [] for webhook_id in webhooks}
    for row in reversed(rows):
        queues[row.webhook_id].append(row)
    chosen: list[Delivery] = []
    while True:
        before = len(chosen)
        for webhook_id, queue in queues.items():
            if queue and load.admits(webhooks[webhook_id]):
                chosen.append(queue.pop())
                load.add(webhook_id, webhooks[webhook_id].host)
        if len(chosen) == before:
            return chosen
