"""Budget counters: the amounts spent and reserved in each period within each limit.

A counter is created from the rollups and the reservations when its limit is first used in a period. From then on, each
unit of work that changes a rollup or a reservation also changes the counter, so the counter always equals the sums of
the rollups and of the reservations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peewee import fn

from corral import clock
from corral.database.statement import Parameter, Statement
from corral.database.unit import after_commit, locked
from corral.events.event import emit
from corral.jobs.job import enqueue
from corral_plugins.cost.api import BudgetChanged, BudgetExceeded, BudgetThresholdReached
from corral_plugins.cost.models import BudgetAlert, BudgetCounter, Reservation
from corral_plugins.cost.service.budget_limit_cache import AGENT, GLOBAL, REVISION, BudgetLimits, Limit
from corral_plugins.cost.service.money import to_usd
from corral_plugins.cost.service.periods import Period, current_period

UNLIMITED = 2**62
CANCEL_JOB = "cost.cancel_running"


class CounterState(NamedTuple):
    """The state of a budget counter: the values of its columns."""

    spent_micro: int
    reserved_micro: int
    limit_micro: int
    alerted: int
    exceeded: bool
    lifted: bool


_STATE = [getattr(BudgetCounter, name) for name in CounterState._fields]


def _counter_condition(p: Parameter) -> Any:
    return (BudgetCounter.scope == p("scope")) & (BudgetCounter.key == p("key")) & (BudgetCounter.period == p("period"))


def _reserve_query(p: Parameter) -> Any:
    is_admitted = BudgetCounter.spent_micro + BudgetCounter.reserved_micro + p("amount") <= p("limit")
    is_lifted = BudgetCounter.lifted == True  # noqa: E712
    more = {BudgetCounter.reserved_micro: BudgetCounter.reserved_micro + p("amount")}
    return BudgetCounter.update(more).where(_counter_condition(p) & (is_admitted | is_lifted))


_RESERVE = Statement(_reserve_query)
_RESERVE_FIRST = Statement(lambda p: _reserve_query(p).where(p("revision") == REVISION))
_ADD = Statement(
    lambda p: (
        BudgetCounter.update(
            {
                BudgetCounter.spent_micro: BudgetCounter.spent_micro + p("spent"),
                BudgetCounter.reserved_micro: BudgetCounter.reserved_micro + p("reserved"),
            }
        )
        .where(_counter_condition(p))
        .returning(*_STATE)
    )
)
_FIND = Statement(lambda p: BudgetCounter.select(*_STATE).where(_counter_condition(p)).tuples())


def _key_columns(limit: Limit, period: Period) -> dict[str, Any]:
    return {"scope": limit.scope, "key": limit.key, "period": period.name}


def condition(limit: Limit, period: Period) -> Any:
    """Return the SQL condition that selects the counter of a limit in a period."""
    return (
        (BudgetCounter.scope == limit.scope) & (BudgetCounter.key == limit.key) & (BudgetCounter.period == period.name)
    )


def find(limit: Limit, period: Period) -> CounterState | None:
    """Return the state of a counter, or None if the counter does not exist yet."""
    row = _FIND.one(_key_columns(limit, period))
    return None if row is None else CounterState(*row)


def computed_values(limit: Limit, period: Period) -> dict[str, int]:
    """Compute the correct values of a counter: the costs in the period, and the unused parts of the reservations."""
    left: Any = Reservation.select(fn.SUM(Reservation.amount_micro - Reservation.used_micro))
    if limit.scope == AGENT:
        left = left.where(Reservation.agent_id == limit.key)
    return {"spent_micro": period.cost_micro(limit.key), "reserved_micro": int(left.scalar() or 0)}


def create_if_missing(limits: BudgetLimits, limit: Limit, period: Period) -> bool:
    """Create the counter of a limit in a period, unless it exists. Return whether it was created.

    No counter is created if another process has changed the limits in the meantime. The counter of a removed limit
    would no longer be updated, and so would be wrong if the limit were set again.

    Call this function before the rollups are written at the end of the current unit of work.
    """
    name = (limit.scope, limit.key, period.name)
    if name in limits.known:
        return False
    created = False
    if find(limit, period) is None:
        if not _is_current(limits):
            return False
        row = {**_key_columns(limit, period), "limit_micro": limit.limit_micro, **computed_values(limit, period)}
        insert = BudgetCounter.insert(**row).on_conflict_ignore().returning(BudgetCounter.period).tuples()
        created = bool(list(insert.execute()))
        if created and limit.scope == GLOBAL:
            publish_change(limits)
    after_commit(lambda: limits.known.add(name))
    return created


def _is_current(limits: BudgetLimits) -> bool:
    """Return whether these limits are still in force. If so, they stay in force until the unit of work ends."""
    row = locked(REVISION, share=True).tuples().first()
    return (0 if row is None else int(row[0])) == limits.revision


def publish_change(limits: BudgetLimits) -> None:
    """Publish a `BudgetChanged` event, which wakes workers that wait for tasks."""
    limit = limits.configuration.monthly_limit_micro
    emit(BudgetChanged(monthly_limit_usd=None if limit is None else to_usd(limit)), object=("budget", GLOBAL))


def reserve(limits: BudgetLimits, applicable: list[Limit], amount: int) -> Limit | None:
    """Reserve an amount under each of the given limits. Return the first limit that the amount would exceed, if any.

    If `limits` is outdated, reserve nothing and return the first limit.
    """
    period = current_period(limits.zone)
    for limit in applicable:
        create_if_missing(limits, limit, period)
    statement = _RESERVE_FIRST
    for limit in applicable:
        ceiling = limit.limit_micro if limit.is_hard else UNLIMITED
        values = {**_key_columns(limit, period), "amount": amount, "limit": ceiling, "revision": limits.revision}
        if not statement.run(values):
            return limit
        statement = _RESERVE
    return None


def add(limits: BudgetLimits, limit: Limit, *, spent: int, reserved: int) -> CounterState | None:
    """Add spent, reserved or released amounts to a counter, and publish events for the thresholds that it has reached.

    Return the new state of the counter, or None if the counter does not exist yet.
    """
    period = current_period(limits.zone)
    row = _ADD.one({**_key_columns(limit, period), "spent": spent, "reserved": reserved})
    if row is None:
        return None
    state = CounterState(*row)
    publish_thresholds(limits, limit, period, state)
    return state


# -- alerts


def publish_thresholds(limits: BudgetLimits, limit: Limit, period: Period, state: CounterState) -> None:
    """Publish an event for each threshold that the costs have reached, and another event if the budget is exceeded.

    Each event is published once per period.
    """
    reached = [n for n in limits.configuration.alert_thresholds if n > state.alerted and _has_reached(state, n)]
    exceeds = is_exceeded(state) and not state.exceeded
    if not reached and not exceeds:
        return
    alerted = max([state.alerted, *reached])
    BudgetCounter.update(alerted=alerted, exceeded=state.exceeded or exceeds).where(condition(limit, period)).execute()
    agent_id = limit.key or None
    spent, most = to_usd(state.spent_micro), to_usd(state.limit_micro)
    subject = ("budget", limit.key or GLOBAL)
    for threshold in reached:
        alert = {**_key_columns(limit, period), "threshold": threshold, "sent_at": clock.now()}
        if list(BudgetAlert.insert(**alert).on_conflict_ignore().returning(BudgetAlert.threshold).tuples().execute()):
            event = BudgetThresholdReached(
                scope=limit.scope,
                agent_id=agent_id,
                threshold=threshold,
                percent=percent_of(state.spent_micro, state.limit_micro),
                spent_usd=spent,
                limit_usd=most,
            )
            emit(event, object=subject)
    if exceeds:
        emit(BudgetExceeded(scope=limit.scope, agent_id=agent_id, spent_usd=spent, limit_usd=most), object=subject)
        if limit.is_hard and limits.configuration.on_exceeded == "cancel_running":
            enqueue(CANCEL_JOB, agent_id=agent_id)


def apply_limit(limits: BudgetLimits, limit: Limit) -> None:
    """Apply a new limit to the counter of the current period.

    Thresholds that the costs no longer reach can be reported again. If the costs exceed the new limit, an event is
    published immediately.
    """
    period = current_period(limits.zone)
    create_if_missing(limits, limit, period)
    state = find(limit, period)
    assert state is not None, "the counter was created above"
    state = state._replace(limit_micro=limit.limit_micro)
    of_period = (
        (BudgetAlert.scope == limit.scope) & (BudgetAlert.key == limit.key) & (BudgetAlert.period == period.name)
    )
    sent = [row.threshold for row in BudgetAlert.select(BudgetAlert.threshold).where(of_period)]
    kept = [threshold for threshold in sent if _has_reached(state, threshold)]
    BudgetAlert.delete().where(of_period & BudgetAlert.threshold.in_(sorted({*sent} - {*kept}))).execute()
    state = state._replace(alerted=max([0, *kept]), exceeded=state.exceeded and is_exceeded(state))
    changes = {"limit_micro": state.limit_micro, "alerted": state.alerted, "exceeded": state.exceeded}
    BudgetCounter.update(**changes).where(condition(limit, period)).execute()
    publish_thresholds(limits, limit, period, state)


def _has_reached(state: CounterState, threshold: int) -> bool:
    return state.spent_micro > 0 and state.spent_micro * 100 >= threshold * state.limit_micro


def is_exceeded(state: CounterState) -> bool:
    """Return whether the limit is used up. A limit of 0 is exceeded as soon as any money is spent."""
    return 0 < state.spent_micro >= state.limit_micro


def percent_of(spent_micro: int, limit_micro: int) -> float:
    """Return the percentage of a limit that was spent. If the limit is 0, any cost counts as at least 100 percent."""
    if limit_micro == 0:
        return 100.0 if spent_micro > 0 else 0.0
    return round(spent_micro * 100 / limit_micro, 2)
