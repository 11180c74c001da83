"""Cost reports by day, agent, provider, model, task, workflow and user. Reports read only rollups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from typing import Any, TypeVar

from corral import clock
from corral.http.page import Page
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import Agents
from corral_plugins.cost.models import DeletedAgent
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.budget_limit_cache import BudgetLimitCache
from corral_plugins.cost.service.day_buckets import current_day, date_of, day_number, day_of, offset_spans, parse_zone
from corral_plugins.cost.service.money import to_usd
from corral_plugins.cost.service.rollups import ZERO, RollupCounters
from corral_plugins.cost.shapes import (
    AgentCost,
    CostsByAgent,
    CostsByProvider,
    CostSummary,
    DailyCosts,
    DailyQuery,
    DayCost,
    DaysQuery,
    ModelCost,
    ModelRank,
    ProviderCost,
    RankedQuery,
    TaskCost,
    TokenSums,
    UserCost,
    WorkflowCost,
    ZoneQuery,
)

T = TypeVar("T")


class CostReports:
    """Builds cost reports. Every method runs in the caller's unit of work."""

    agents: Agents | None

    def __init__(self, accounts: Accounts, limits: BudgetLimitCache) -> None:
        self._accounts, self._limits = accounts, limits

    # -- by day

    def get_summary(self, query: ZoneQuery) -> CostSummary:
        """Return the costs for today, this week, this month and last month in a time zone, and for all time."""
        tz = parse_zone(query.tz)
        now = current_day(tz)
        month = now.replace(day=1)
        last_month = (month - timedelta(days=1)).replace(day=1)
        days = rollups.totals_by_local_day(offset_spans(last_month, now, tz))

        def between(first: date, end: date) -> int:
            return sum(days.get(day, ZERO).cost_micro for day in range(day_number(first), day_number(end)))

        tomorrow = now + timedelta(days=1)
        this, last = between(month, tomorrow), between(last_month, month)
        total = _sum_of_totals(totals for _, _, totals in rollups.grouped_totals(rollups.TOTAL))
        return CostSummary(
            today_usd=to_usd(between(now, tomorrow)),
            week_usd=to_usd(between(now - timedelta(days=now.weekday()), tomorrow)),
            month_usd=to_usd(this),
            last_month_usd=to_usd(last),
            total_usd=to_usd(total.cost_micro),
            change_percent=round((this - last) / last * 100, 2) if last > 0 else None,
            tokens=_token_sums(total),
            unpriced_tokens=total.unpriced_tokens,
            unpriced_calls=total.unpriced_calls,
            wasted_usd=to_usd(total.wasted_micro),
            cost_per_completed_task_usd=_per_completed_task(total),
            as_of=clock.now(),
        )

    def list_by_day(self, query: DailyQuery) -> DailyCosts:
        """Return the costs for each of the last `query.days` days in a time zone, oldest first.

        Days without costs are included with zero costs.
        """
        tz = parse_zone(query.tz)
        last = current_day(tz)
        first = last - timedelta(days=query.days - 1)
        agent_id = query.agent_id.lower() if isinstance(query.agent_id, str) else ""
        provider = query.provider if isinstance(query.provider, str) else ""
        totals = rollups.totals_by_local_day(offset_spans(first, last, tz), agent_id=agent_id, provider=provider)
        days = range(day_number(first), day_number(last) + 1)
        return DailyCosts(
            items=[DayCost(date=date_of(day).isoformat(), **_total_fields(totals.get(day, ZERO))) for day in days]
        )

    # -- breakdowns

    def list_by_agent(self, query: DaysQuery) -> CostsByAgent:
        """Return the costs for the last `query.days` days by agent, most expensive first."""
        rows = self._grouped_totals(rollups.AGENT, query)
        names = self._agent_names([agent_id for agent_id, _, _ in rows if agent_id])
        limits = self._limits.current().agents
        items = [
            AgentCost(
                agent_id=agent_id or None,
                name=names.get(agent_id, (None, False))[0],
                deleted=names.get(agent_id, (None, False))[1],
                tasks=totals.tasks,
                cost_per_completed_task_usd=_per_completed_task(totals),
                budget=to_usd(limits[agent_id]) if agent_id in limits else None,
                **_total_fields(totals),
            )
            for agent_id, _, totals in rows
        ]
        return CostsByAgent(items=items, total_usd=_total_usd(rows))

    def _agent_names(self, agent_ids: list[str]) -> dict[str, tuple[str | None, bool]]:
        """Return the name of each agent and whether the agent is deleted. Deleted agents keep their last name."""
        if self.agents is None:
            return {}
        existing = {agent_id: (facts.name, False) for agent_id, facts in self.agents.find_many(agent_ids).items()}
        deleted = [agent_id for agent_id in agent_ids if agent_id not in existing]
        names = {row.agent_id: row.name for row in DeletedAgent.select().where(DeletedAgent.agent_id.in_(deleted))}
        return {**existing, **{agent_id: (names.get(agent_id), True) for agent_id in deleted}}

    def list_by_provider(self, query: DaysQuery) -> CostsByProvider:
        """Return the costs for the last `query.days` days by provider, most expensive first.

        Each provider contains the costs of its models, also most expensive first.
        """
        rows = self._grouped_totals(rollups.MODEL, query)
        models: dict[str, list[tuple[str, RollupCounters]]] = {}
        for provider, model, totals in rows:
            models.setdefault(provider, []).append((model, totals))
        items = [
            ProviderCost(
                provider=provider,
                models=[ModelCost(model=model, **_total_fields(totals)) for model, totals in of_provider],
                **_total_fields(_sum_of_totals(totals for _, totals in of_provider)),
            )
            for provider, of_provider in models.items()
        ]
        items.sort(key=lambda item: (-item.cost_usd, -item.calls, item.provider))
        return CostsByProvider(items=items, total_usd=_total_usd(rows))

    def list_by_model(self, query: RankedQuery) -> Page[ModelRank]:
        """Return the costs for the last `query.days` days by model, most expensive first."""
        rows = self._grouped_totals(rollups.MODEL, query)
        return _page_of(rows, query, lambda row: ModelRank(provider=row[0], model=row[1], **_total_fields(row[2])))

    def list_by_workflow(self, query: RankedQuery) -> Page[WorkflowCost]:
        """Return the costs for the last `query.days` days by workflow, most expensive first."""
        rows = self._grouped_totals(rollups.WORKFLOW, query)
        return _page_of(rows, query, lambda row: WorkflowCost(workflow_id=row[0], **_total_fields(row[2])))

    def list_by_user(self, query: RankedQuery) -> Page[UserCost]:
        """Return the costs for the last `query.days` days by user, most expensive first."""
        rows = self._grouped_totals(rollups.USER, query)
        page = _page_of(rows, query, lambda row: UserCost(user_id=row[0] or None, name=None, **_total_fields(row[2])))
        users = self._accounts.get_many([item.user_id for item in page.items if item.user_id is not None])
        for item in page.items:
            user = users.get(item.user_id or "")
            item.name = user.full_name if user is not None else None
        return page

    def list_by_task(self, query: RankedQuery) -> Page[TaskCost]:
        """Return the costs for the last `query.days` days by task, most expensive first."""
        first, last = _day_range(query)
        rows, total = rollups.costliest_tasks(first, last, limit=query.limit, offset=query.offset)
        items = [TaskCost(task_id=task_id, **_total_fields(totals)) for task_id, totals in rows]
        return Page(items=items, total=total, limit=query.limit, offset=query.offset, next=None)

    @staticmethod
    def _grouped_totals(series: str, query: DaysQuery) -> list[tuple[str, str, RollupCounters]]:
        rows = [row for row in rollups.grouped_totals(series, *_day_range(query)) if row[2].events]
        return sorted(rows, key=lambda row: (-row[2].cost_micro, -row[2].calls, row[0], row[1]))


def _total_fields(totals: RollupCounters) -> dict[str, Any]:
    """Return the fields of `CostTotals`, which the response bodies of all cost reports contain."""
    return {
        "cost_usd": to_usd(totals.cost_micro),
        "calls": totals.calls,
        "tokens": _token_sums(totals),
        "unpriced_tokens": totals.unpriced_tokens,
    }


def _token_sums(totals: RollupCounters) -> TokenSums:
    return TokenSums(
        input=totals.input_tokens,
        output=totals.output_tokens,
        cache_read=totals.cache_read_tokens,
        cache_write=totals.cache_write_tokens,
    )


def _day_range(query: DaysQuery) -> tuple[int, int]:
    last = day_of(clock.now())
    return last - query.days + 1, last


def _sum_of_totals(groups: Iterable[RollupCounters]) -> RollupCounters:
    return functools.reduce(RollupCounters.add, groups, ZERO)


def _per_completed_task(totals: RollupCounters) -> float | None:
    return to_usd(round(totals.cost_micro / totals.completed)) if totals.completed else None


def _total_usd(rows: Iterable[tuple[str, str, RollupCounters]]) -> float:
    return to_usd(sum(totals.cost_micro for _, _, totals in rows))


def _page_of(
    rows: list[tuple[str, str, RollupCounters]],
    query: RankedQuery,
    view: Callable[[tuple[str, str, RollupCounters]], T],
) -> Page[T]:
    items = [view(row) for row in rows[query.offset : query.offset + query.limit]]
    return Page(items=items, total=len(rows), limit=query.limit, offset=query.offset, next=None)
