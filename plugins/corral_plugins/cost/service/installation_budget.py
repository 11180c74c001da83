"""The budget of the installation: its configuration, its state in the current period, and the list of reservations."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo

from msgspec import UNSET
from peewee import fn

from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid
from corral.http.answers import IfMatch
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral_plugins.cost.models import Budget, BudgetAlert, BudgetCounter, Reservation
from corral_plugins.cost.service import budget_counters, rollups
from corral_plugins.cost.service.agent_limits import AgentLimits
from corral_plugins.cost.service.budget_limit_cache import (
    AGENT,
    BUDGET_ID,
    GLOBAL,
    BudgetConfiguration,
    BudgetLimitCache,
    BudgetLimits,
    configuration_of,
    increment_revision,
)
from corral_plugins.cost.service.day_buckets import current_day, offset_spans
from corral_plugins.cost.service.money import to_micro_usd, to_usd
from corral_plugins.cost.service.periods import Period, current_period
from corral_plugins.cost.shapes import (
    AgentBudgetView,
    BudgetAlertView,
    BudgetChange,
    BudgetView,
    ReservationQuery,
    ReservationView,
)

PROJECTED_DAYS = 7
MAX_LISTED = 200


class Budgets:
    """Reads and changes the budget. Every method runs in the caller's unit of work."""

    audit: Audit | None

    def __init__(self, limits: BudgetLimitCache, agent_limits: AgentLimits) -> None:
        self._limits, self._agent_limits = limits, agent_limits

    def get(self) -> BudgetView:
        """Return the budget and its state in the current period."""
        row: Budget | None = Budget.get_or_none(Budget.id == BUDGET_ID)
        configuration = configuration_of(row)
        limits = self._limits.current()
        period = current_period(limits.zone)
        spent, reserved = period.cost_micro(), _reserved_micro()
        limit = configuration.monthly_limit_micro
        return BudgetView(
            version=1 if row is None else row.version,
            monthly_limit=None if limit is None else to_usd(limit),
            alert_thresholds=list(configuration.alert_thresholds),
            mode=configuration.mode,
            on_exceeded=configuration.on_exceeded,
            timezone=configuration.timezone,
            period_start=period.starts_at,
            period_end=period.ends_at,
            spent_usd=to_usd(spent),
            reserved_usd=to_usd(reserved),
            remaining_usd=None if limit is None else to_usd(limit - spent - reserved),
            percent=None if limit is None else budget_counters.percent_of(spent, limit),
            projected_usd=to_usd(spent + _projected_rest_micro(period)),
            status=_status(configuration, spent),
            by_agent=self._by_agent(),
            alerts_sent=_sent_alerts(period),
        )

    def _by_agent(self) -> list[AgentBudgetView]:
        found = sorted(self._agent_limits.budgets().items(), key=lambda item: (-item[1].spent, item[0]))
        return [
            AgentBudgetView(
                agent_id=agent_id,
                limit=to_usd(budget.limit),
                spent=to_usd(budget.spent),
                reserved=to_usd(budget.reserved),
            )
            for agent_id, budget in found[:MAX_LISTED]
        ]

    def change(self, change: BudgetChange, match: IfMatch) -> BudgetView:
        """Change the budget. The change takes effect in the current period.

        Raise `Conflict` if the budget was changed concurrently.
        """
        row: Budget | None = Budget.get_or_none(Budget.id == BUDGET_ID)
        version = 1 if row is None else row.version
        match.check(version)
        before = _columns(configuration_of(row))
        changes = {name: value for name, value in _changed_columns(change).items() if value != before[name]}
        if changes:
            increment_revision()
            unchanged = (Budget.id == BUDGET_ID) & (Budget.version == version)
            if not Budget.update(**changes, version=version + 1).where(unchanged).execute():
                raise Conflict("The budget was changed in the meantime; fetch it again and repeat the change.")
            self._apply(changes)
            self._record_audit({name: (before[name], value) for name, value in changes.items()})
        return self.get()

    def _apply(self, changes: dict[str, Any]) -> None:
        limits = self._limits.reload()
        if "timezone" in changes:  # the periods begin and end at other instants, so all sums change
            BudgetCounter.delete().execute()
        elif limits.overall is None:
            BudgetCounter.delete().where(BudgetCounter.scope == GLOBAL).execute()
        is_published = False
        if limits.overall is not None:
            is_published = budget_counters.create_if_missing(limits, limits.overall, current_period(limits.zone))
            budget_counters.apply_limit(limits, limits.overall)
        if not is_published:  # a new counter of the whole budget has published it
            budget_counters.publish_change(limits)

    def _record_audit(self, changes: dict[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(action="cost.budget.update", object_type="budget", object_id=GLOBAL, changes=changes)
            self.audit.record(entry)

    def lacks_counters(self) -> bool:
        """Return whether any limit may lack a counter for the current period, according to the limits in memory."""
        limits = self._limits.current()
        return bool(_without_counter(limits, current_period(limits.zone)))

    def create_counters(self, limit: int) -> int:
        """Create the missing counters of a new period, for at most `limit` limits.

        Return the number of checked limits.
        """
        limits = self._limits.current()
        period = current_period(limits.zone)
        checked = _without_counter(limits, period)[:limit]
        created = [each for each in checked if budget_counters.create_if_missing(limits, each, period)]
        if any(each.scope == AGENT for each in created):
            budget_counters.publish_change(limits)
        return len(checked)

    @staticmethod
    def list_reservations(query: ReservationQuery, by: Principal) -> Page[ReservationView]:
        """Return a page of the reservations, newest first."""
        return paginate(
            Reservation.select(),
            query,
            by,
            scope="cost.reservations",
            order=newest_first(Reservation),
            make=_reservation_view,
        )


def _without_counter(limits: BudgetLimits, period: Period) -> list[Any]:
    """Return the limits that may lack a counter for a period."""
    return [each for each in limits.all() if (each.scope, each.key, period.name) not in limits.known]


def _columns(configuration: BudgetConfiguration) -> dict[str, Any]:
    return {
        "monthly_limit_micro": configuration.monthly_limit_micro,
        "alert_thresholds": list(configuration.alert_thresholds),
        "mode": configuration.mode,
        "on_exceeded": configuration.on_exceeded,
        "timezone": configuration.timezone,
    }


def _changed_columns(change: BudgetChange) -> dict[str, Any]:
    names = ("alert_thresholds", "mode", "on_exceeded", "timezone")
    columns: dict[str, Any] = {name: value for name in names if (value := getattr(change, name)) is not UNSET}
    if change.monthly_limit is not UNSET:
        limit = change.monthly_limit
        columns["monthly_limit_micro"] = None if limit is None else to_micro_usd(limit)
    thresholds = columns.get("alert_thresholds", [])
    if thresholds != sorted(set(thresholds)):
        detail = "Give the thresholds in strictly ascending order, such as [50, 80, 100]."
        raise Invalid.at("/alert_thresholds", "bad_format", detail)
    if "timezone" in columns:
        try:
            ZoneInfo(columns["timezone"])
        except (KeyError, ValueError, OSError):
            detail = "Give an IANA time zone, such as Europe/Berlin."
            raise Invalid.at("/timezone", "bad_format", detail) from None
    return columns


def _reserved_micro() -> int:
    left: Any = Reservation.select(fn.SUM(Reservation.amount_micro - Reservation.used_micro))
    return int(left.scalar() or 0)


def _projected_rest_micro(period: Period) -> int:
    """Return the expected costs for the rest of the period.

    The mean daily cost of the last 7 days is multiplied by the number of days left.
    """
    today = current_day(period.zone)
    spans = offset_spans(today - timedelta(days=PROJECTED_DAYS - 1), today, period.zone)
    recent = sum(totals.cost_micro for totals in rollups.totals_by_local_day(spans).values())
    days_left = (period.end - today).days - 1
    return round(recent * days_left / PROJECTED_DAYS)


def _status(configuration: BudgetConfiguration, spent: int) -> str:
    limit = configuration.monthly_limit_micro
    if limit is None or configuration.mode == "off":
        return "ok"
    if spent >= limit:
        return "exceeded"
    percent = budget_counters.percent_of(spent, limit)
    return "warning" if any(percent >= threshold for threshold in configuration.alert_thresholds) else "ok"


def _sent_alerts(period: Period) -> list[BudgetAlertView]:
    newest = (
        BudgetAlert.select()
        .where(BudgetAlert.period == period.name)
        .order_by(BudgetAlert.sent_at.desc(), BudgetAlert.threshold.desc())
        .limit(MAX_LISTED)
    )
    return [
        BudgetAlertView(scope=row.scope, agent_id=row.key or None, threshold=row.threshold, sent_at=row.sent_at)
        for row in newest
    ]


def _reservation_view(row: Reservation) -> ReservationView:
    return ReservationView(
        id=row.id,
        holder=row.holder,
        holder_id=row.holder_id,
        agent_id=row.agent_id,
        task_id=row.task_id,
        amount_usd=to_usd(row.amount_micro),
        used_usd=to_usd(row.used_micro),
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def delete_old_periods(before: str) -> None:
    """Delete the counters and alerts of periods that ended before the month of the instant `before`."""
    month = before[:7]
    BudgetCounter.delete().where(BudgetCounter.period < month).execute()
    BudgetAlert.delete().where(BudgetAlert.period < month).execute()
