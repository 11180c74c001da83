"""Reservations: money that is set aside before it is spent.

The reservation of an attempt is made when its task is claimed. LLM gateway calls under the attempt's lease use money
from this reservation. A call that needs more than the remaining amount enlarges the reservation. A call without a task
has its own reservation. When a cost is settled, it replaces the amount that was reserved for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import peewee

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import before_commit, current, locked
from corral.ids import new_id
from corral_plugins.cost.api import (
    BudgetRefused,
    BudgetScope,
    BudgetShortage,
    Headroom,
    Hold,
    NewReservation,
    format_micro_usd,
)
from corral_plugins.cost.models import Reservation
from corral_plugins.cost.service import budget_counters
from corral_plugins.cost.service.budget_limit_cache import AGENT, REVISION, BudgetLimitCache, BudgetLimits, Limit
from corral_plugins.cost.service.metrics import BudgetRefusals
from corral_plugins.cost.service.periods import current_period

_INSERTED = (
    "id",
    "holder",
    "holder_id",
    "lease_id",
    "agent_id",
    "task_id",
    "amount_micro",
    "drawn_micro",
    "limit_micro",
    "created_at",
    "expires_at",
)
_INSERT = Statement(
    lambda p: Reservation.insert(
        {**{getattr(Reservation, name): p(name) for name in _INSERTED}, Reservation.used_micro: 0}
    )
)
_DRAW = Statement(
    lambda p: Reservation.update({Reservation.drawn_micro: Reservation.drawn_micro + p("amount")}).where(
        (Reservation.holder_id == p("holder_id"))
        & (Reservation.used_micro + Reservation.drawn_micro + p("amount") <= Reservation.amount_micro)
    )
)
_COLUMNS = (
    Reservation.holder,
    Reservation.agent_id,
    Reservation.amount_micro,
    Reservation.used_micro,
    Reservation.drawn_micro,
    Reservation.limit_micro,
)
_LOCK = Statement(
    lambda p: locked(Reservation.select(*_COLUMNS).where(Reservation.holder_id == p("holder_id"))).tuples()
)
_UPDATE = Statement(
    lambda p: Reservation.update(
        {
            Reservation.amount_micro: p("amount"),
            Reservation.used_micro: p("used"),
            Reservation.drawn_micro: p("drawn"),
        }
    ).where(Reservation.holder_id == p("holder_id"))
)
_SPEND = Statement(
    lambda p: (
        Reservation.update(
            {
                Reservation.used_micro: Reservation.used_micro + p("cost"),
                Reservation.drawn_micro: peewee.Case(
                    None, [(Reservation.drawn_micro > p("held"), Reservation.drawn_micro - p("held"))], 0
                ),
            }
        )
        .where(
            (Reservation.holder_id == p("holder_id"))
            & (Reservation.holder == "attempt")
            & (Reservation.used_micro + p("cost") <= Reservation.amount_micro)
        )
        .returning(Reservation.agent_id, REVISION)
    )
)
_DELETE = Statement(
    lambda p: (
        Reservation.delete()
        .where(Reservation.holder_id == p("holder_id"))
        .returning(Reservation.agent_id, Reservation.amount_micro, Reservation.used_micro, REVISION)
    )
)
_BUDGETS: dict[BudgetScope, str] = {
    "global": "The budget of the installation",
    "agent": "The budget of the agent",
    "task": "The cost limit of the task",
}


class Reservations:
    """Reserves money and releases it. Every method runs in the caller's unit of work."""

    def __init__(self, limits: BudgetLimitCache, refusals: BudgetRefusals) -> None:
        self._limits, self._refusals = limits, refusals

    def is_limited(self, agent_id: str | None) -> bool:
        """Return whether any budget limit applies to the costs of the agent."""
        return bool(self._limits.probable_limits(agent_id).of(agent_id))

    @property
    def may_exist(self) -> bool:
        """Whether reservations can exist, which is the case if any budget limit is set.

        Only the limits in memory are checked. If another process has just set the first limit, the result can be
        wrong. A reservation that is therefore not released by its caller is released when it expires.
        """
        return not self._limits.cached.is_unlimited

    def confirm_limits(self, revision: int | None) -> None:
        """Update the limits of the current unit of work, which has just read their `revision` from the database."""
        self._limits.confirm(revision)

    def headroom(self, agent_id: str | None) -> Headroom:
        """Return how much can still be spent before a limit is reached.

        This method creates no counters, so it can run in a read-only unit of work.
        """
        limits = self._limits.current()
        if limits.is_unlimited:
            return Headroom()
        period, left, most = current_period(limits.zone), {}, {}
        for limit in limits.of(agent_id):
            state = self._limits.pending_states.get(limit) or budget_counters.find(limit, period)
            if not limit.is_hard or (state is not None and state.lifted):
                continue
            used = budget_counters.computed_values(limit, period).values() if state is None else state[:2]
            left[limit.scope], most[limit.scope] = limit.limit_micro - sum(used), limit.limit_micro
        return Headroom(
            overall=left.get("global"),
            agent=left.get("agent"),
            overall_limit=most.get("global"),
            agent_limit=most.get("agent"),
        )

    def reserve(self, wanted: NewReservation) -> Hold | None:
        """Reserve money. Implements `Costs.reserve`."""
        if wanted.amount_micro_usd <= 0:
            return None
        return self._insert(wanted, drawn=0 if wanted.holder == "attempt" else wanted.amount_micro_usd)

    def _insert(self, wanted: NewReservation, *, drawn: int) -> Hold | None:
        amount, limit = wanted.amount_micro_usd, wanted.attempt_limit_micro_usd
        if limit is not None and amount > limit:
            raise self._shortage_refusal("task", needed=amount, left=limit)
        if not self._admit(wanted.agent_id, amount, needed=amount) and limit is None:
            return None
        _INSERT.run(
            {
                "id": new_id(),
                "holder": wanted.holder,
                "holder_id": wanted.holder_id,
                "lease_id": wanted.lease_id,
                "agent_id": wanted.agent_id,
                "task_id": wanted.task_id,
                "amount_micro": wanted.amount_micro_usd,
                "drawn_micro": drawn,
                "limit_micro": wanted.attempt_limit_micro_usd,
                "created_at": clock.now(),
                "expires_at": wanted.expires_at,
            }
        )
        return Hold(holder_id=wanted.holder_id, amount_micro_usd=wanted.amount_micro_usd)

    def draw(self, wanted: NewReservation) -> Hold | None:
        """Set aside a part of an attempt's reservation for a call. Implements `Costs.draw`."""
        amount = wanted.amount_micro_usd
        if amount <= 0:
            return None
        if wanted.attempt_limit_micro_usd is None and not self.is_limited(wanted.agent_id):
            return None
        hold = Hold(holder_id=wanted.holder_id, amount_micro_usd=amount)
        if _DRAW.run({"holder_id": wanted.holder_id, "amount": amount}):
            return hold
        row = _LOCK.one({"holder_id": wanted.holder_id})
        if row is None:
            return self._insert(wanted, drawn=amount)
        _, agent_id, reserved, used, drawn, limit = row
        total = used + drawn + amount
        if total > reserved:  # false only if another call was settled in the meantime
            if limit is not None and total > limit:  # first, because a larger budget would not help
                raise self._shortage_refusal("task", needed=amount, left=limit - used - drawn)
            self._admit(agent_id, total - reserved, needed=amount)
        values = {"amount": max(total, reserved), "used": used, "drawn": drawn + amount}
        _UPDATE.run({**values, "holder_id": wanted.holder_id})
        return hold

    def _admit(self, agent_id: str | None, amount: int, *, needed: int) -> bool:
        """Reserve `amount` within the limits. Return whether any limit applies.

        `needed` is the total amount that the call needs. The attempt of the call has already reserved the difference
        between `needed` and `amount`.
        """
        while applicable := (limits := self._limits.probable_limits(agent_id)).of(agent_id):
            refused_by = budget_counters.reserve(limits, applicable, amount)
            if refused_by is None:
                self._limits.adopt(limits)
                return True
            if refused_by != applicable[0] or self._limits.reload().revision == limits.revision:
                raise self._refusal_by_limit(refused_by, limits, amount, needed=needed)
        return False

    def _refusal_by_limit(self, refused_by: Limit, limits: BudgetLimits, amount: int, *, needed: int) -> BudgetRefused:
        state = budget_counters.find(refused_by, current_period(limits.zone))
        left = 0 if state is None else refused_by.limit_micro - state.spent_micro - state.reserved_micro
        scope: BudgetScope = "agent" if refused_by.scope == AGENT else "global"
        return self._shortage_refusal(scope, needed=needed, left=left + needed - amount)

    def _shortage_refusal(self, scope: BudgetScope, *, needed: int, left: int) -> BudgetRefused:
        detail = (
            f"{_BUDGETS[scope]} does not allow this call, which may cost {format_micro_usd(needed)}: "
            f"{format_micro_usd(left)} is left."
        )
        return self.record_refusal(scope, detail, BudgetShortage(needed=needed, left=left))

    def record_refusal(self, scope: BudgetScope, detail: str, shortage: BudgetShortage | None = None) -> BudgetRefused:
        """Count a refused reservation, and return the `BudgetRefused` problem to raise."""
        self._refusals.count(scope)
        return BudgetRefused(scope, detail, shortage)

    def settle(
        self, holder_id: str | None, *, held: int, cost: int, agent_id: str | None, is_call: bool = False
    ) -> None:
        """At the end of the unit of work, count the cost of a call instead of the amount set aside for the call.

        `is_call` means that the reservation belongs to a single call, so it ends with the call.
        """
        if cost:
            self._ensure_counters(agent_id)
        if held or cost:
            change = _BudgetChange(self._limits, holder_id, held=held, cost=cost, agent_id=agent_id, ends=is_call)
            before_commit(change)

    def _ensure_counters(self, agent_id: str | None) -> None:
        limits = self._limits.current()
        period = current_period(limits.zone)
        for limit in limits.of(agent_id):
            budget_counters.create_if_missing(limits, limit, period)

    def release(self, holder_id: str) -> None:
        """Delete the reservation of a holder at the end of the unit of work.

        Does nothing if the holder has no reservation.
        """
        before_commit(_BudgetChange(self._limits, holder_id, ends=True))


class _BudgetChange:
    """A change to a reservation and to budget counters, applied at the end of the unit of work.

    A unit of work may collect several changes. The last one applies them all in a fixed order: first the reservations,
    then the counters of the installation and of the agents. Concurrent units of work therefore cannot deadlock, and
    they lock the counters only briefly. Rolling back to a savepoint discards the changes that were collected after it.
    """

    def __init__(
        self,
        limits: BudgetLimitCache,
        holder_id: str | None,
        *,
        held: int = 0,
        cost: int = 0,
        agent_id: str | None = None,
        ends: bool = False,
    ) -> None:
        self.limits, self.holder_id, self.agent_id = limits, holder_id, agent_id
        self.held, self.cost, self.ends = held, cost, ends

    def __call__(self) -> None:
        pending = [each for each in current().before if isinstance(each, _BudgetChange)]
        if pending[-1] is not self:
            return
        deltas: dict[str, list[int]] = {"": [0, 0]}  # by agent: what was spent and what was reserved
        holders = sorted({each.holder_id for each in pending if each.holder_id is not None})
        for holder_id in holders:
            agent_id, freed = self._change_reservation(holder_id, [e for e in pending if e.holder_id == holder_id])
            for key in {"", agent_id or ""}:
                deltas.setdefault(key, [0, 0])[1] -= freed
        for each in pending:
            for key in {"", each.agent_id or ""}:
                deltas.setdefault(key, [0, 0])[0] += each.cost
        for key in sorted(deltas):
            spent, reserved = deltas[key]
            if spent or reserved:
                self._add_to_counter(key, spent, reserved)

    def _add_to_counter(self, key: str, spent: int, reserved: int) -> None:
        limits = self.limits.current()
        for limit in limits.of(key or None):
            if limit.key == key:
                state = budget_counters.add(limits, limit, spent=spent, reserved=reserved)
                if state is not None:
                    self.limits.pending_states[limit] = state

    def _change_reservation(self, holder_id: str, changes: Sequence[_BudgetChange]) -> tuple[str | None, int]:
        """Apply changes to a reservation. Return its agent, and the amount by which its unused part became smaller."""
        held, cost = sum(each.held for each in changes), sum(each.cost for each in changes)
        if any(each.ends for each in changes):
            return self._delete_reservation(holder_id)
        spent = _SPEND.one({"holder_id": holder_id, "held": held, "cost": cost})
        if spent is not None:
            agent_id, revision = spent
            self.limits.confirm(revision)
            return agent_id, cost
        row = _LOCK.one({"holder_id": holder_id})
        if row is None or row[0] == "call":
            return self._delete_reservation(holder_id)
        _, agent_id, amount, used, drawn, _ = row  # the attempt cost more than was reserved
        spent_after = used + cost
        after = max(amount, spent_after)
        _UPDATE.run({"amount": after, "used": spent_after, "drawn": max(0, drawn - held), "holder_id": holder_id})
        return agent_id, amount - used - (after - spent_after)

    def _delete_reservation(self, holder_id: str) -> tuple[str | None, int]:
        """Delete a reservation. Return its agent, and the amount that was left in the reservation."""
        row = _DELETE.one({"holder_id": holder_id})
        if row is None:
            return None, 0
        agent_id, amount, used, revision = row
        self.limits.confirm(revision)
        return agent_id, amount - used


# -- reservations without a sign of life


def find_expiring(before: str, limit: int) -> list[Reservation]:
    """Return at most `limit` reservations that expire before an instant, oldest first."""
    expiring = Reservation.expires_at < before
    return list(Reservation.select().where(expiring).order_by(Reservation.expires_at).limit(limit))


def extend(expiries: dict[str, str]) -> None:
    """Set new expiry times for reservations. `expiries` maps the id of each reservation to its new expiry time."""
    for reservation_id, expires_at in sorted(expiries.items()):
        Reservation.update(expires_at=expires_at).where(Reservation.id == reservation_id).execute()
