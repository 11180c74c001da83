"""What it cost, by day and by who and what: read from sums alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date, timedelta
from typing import Any, TypeVar

from corral import clock
from corral.http.page import Page
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import Agents
from corral_plugins.cost.models import DeletedAgent
from corral_plugins.cost.service import ranking, sums
from corral_plugins.cost.service.days import date_of, day_of, number_of, stretches, today, zone
from corral_plugins.cost.service.money import usd
from corral_plugins.cost.service.sums import NOTHING, Came
from corral_plugins.cost.shapes import (
    AgentCost,
    ByAgent,
    ByProvider,
    Daily,
    DailyQuery,
    Day,
    DaysQuery,
    ModelCost,
    ModelRank,
    ProviderCost,
    RankedQuery,
    Summary,
    TaskCost,
    TokenSums,
    UserCost,
    ZoneQuery,
)

T = TypeVar("T")


class Reports:
    """Joins the caller's unit."""

    agents: Agents | None

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    # -- by day

    def summary(self, query: ZoneQuery) -> Summary:
        """The present day, week and month in a time zone, and all time."""
        where = zone(query.tz)
        now = today(where)
        month = now.replace(day=1)
        last_month = (month - timedelta(days=1)).replace(day=1)
        days = sums.by_local_day(stretches(last_month, now, where))

        def between(first: date, end: date) -> int:
            return sum(days.get(day, NOTHING).cost_micro for day in range(number_of(first), number_of(end)))

        tomorrow = now + timedelta(days=1)
        this, last = between(month, tomorrow), between(last_month, month)
        whole = _together(figures for _, _, figures in sums.groups(sums.TOTAL, sums.ALL_TIME, sums.ALL_TIME))
        return Summary(
            today_usd=usd(between(now, tomorrow)),
            week_usd=usd(between(now - timedelta(days=now.weekday()), tomorrow)),
            month_usd=usd(this),
            last_month_usd=usd(last),
            total_usd=usd(whole.cost_micro),
            change_percent=round((this - last) / last * 100, 2) if last > 0 else None,
            tokens=tokens(whole),
            unpriced_tokens=whole.unpriced_tokens,
            unpriced_calls=whole.unpriced_calls,
            wasted_usd=usd(whole.wasted_micro),
            cost_per_completed_task_usd=_per_task(whole),
            as_of=clock.now(),
        )

    def daily(self, query: DailyQuery) -> Daily:
        """The last days in a time zone, zero-filled, oldest first."""
        where = zone(query.tz)
        last = today(where)
        first = last - timedelta(days=query.days - 1)
        agent = query.agent_id.lower() if isinstance(query.agent_id, str) else ""
        provider = query.provider if isinstance(query.provider, str) else ""
        found = sums.by_local_day(stretches(first, last, where), agent_id=agent, provider=provider)
        days = range(number_of(first), number_of(last) + 1)
        return Daily(items=[Day(date=date_of(day).isoformat(), **shown(found.get(day, NOTHING))) for day in days])

    # -- by who and what

    def by_agent(self, query: DaysQuery) -> ByAgent:
        """The last days by agent."""
        found = self._days(sums.AGENT, query)
        names = self._names([key for key, _, _ in found if key])
        items = [
            AgentCost(
                agent_id=key or None,
                name=names.get(key, (None, False))[0],
                deleted=names.get(key, (None, False))[1],
                tasks=figures.tasks,
                cost_per_completed_task_usd=_per_task(figures),
                budget=None,
                **shown(figures),
            )
            for key, _, figures in found
        ]
        return ByAgent(items=items, total_usd=_total(found))

    def _names(self, agent_ids: list[str]) -> dict[str, tuple[str | None, bool]]:
        """Name of each agent, as it was if it is deleted, and whether it is."""
        if self.agents is None:
            return {}
        living = {agent_id: (facts.name, False) for agent_id, facts in self.agents.facts_of(agent_ids).items()}
        gone = [agent_id for agent_id in agent_ids if agent_id not in living]
        kept = {row.agent_id: row.name for row in DeletedAgent.select().where(DeletedAgent.agent_id.in_(gone))}
        return {**living, **{agent_id: (kept.get(agent_id), True) for agent_id in gone}}

    def by_provider(self, query: DaysQuery) -> ByProvider:
        """The last days by provider, each with its models."""
        found = self._days(sums.MODEL, query)
        models: dict[str, list[tuple[str, Came]]] = {}
        for provider, model, figures in found:
            models.setdefault(provider, []).append((model, figures))
        items = [
            ProviderCost(
                provider=provider,
                models=[ModelCost(model=model, **shown(figures)) for model, figures in its],
                **shown(_together(figures for _, figures in its)),
            )
            for provider, its in models.items()
        ]
        items.sort(key=lambda item: (-item.cost_usd, -item.calls, item.provider))
        return ByProvider(items=items, total_usd=_total(found))

    def by_model(self, query: RankedQuery) -> Page[ModelRank]:
        """The last days by model, the most expensive first."""
        found = self._days(sums.MODEL, query)
        return _part(found, query, lambda row: ModelRank(provider=row[0], model=row[1], **shown(row[2])))

    def by_user(self, query: RankedQuery) -> Page[UserCost]:
        """The last days by person, the most expensive first."""
        found = self._days(sums.USER, query)
        page = _part(found, query, lambda row: UserCost(user_id=row[0] or None, name=None, **shown(row[2])))
        people = self._accounts.get_many([item.user_id for item in page.items if item.user_id is not None])
        for item in page.items:
            person = people.get(item.user_id or "")
            item.name = person.full_name if person is not None else None
        return page

    def by_task(self, query: RankedQuery) -> Page[TaskCost]:
        """The last days by task, the most expensive first."""
        first, last = _bounds(query)
        rows, total = ranking.tasks(first, last, limit=query.limit, offset=query.offset)
        items = [TaskCost(task_id=task_id, **shown(figures)) for task_id, figures in rows]
        return Page(items=items, total=total, limit=query.limit, offset=query.offset, next=None)

    @staticmethod
    def _days(series: str, query: DaysQuery) -> list[tuple[str, str, Came]]:
        found = [row for row in sums.groups(series, *_bounds(query)) if row[2].events]
        return sorted(found, key=lambda row: (-row[2].cost_micro, -row[2].calls, row[0], row[1]))


def shown(figures: Came) -> dict[str, Any]:
    """The fields of `shapes.Figures`."""
    return {
        "cost_usd": usd(figures.cost_micro),
        "calls": figures.calls,
        "tokens": tokens(figures),
        "unpriced_tokens": figures.unpriced_tokens,
    }


def tokens(figures: Came) -> TokenSums:
    """All tokens, priced or not."""
    return TokenSums(
        input=figures.input_tokens,
        output=figures.output_tokens,
        cache_read=figures.cache_read_tokens,
        cache_write=figures.cache_write_tokens,
    )


def _bounds(query: DaysQuery) -> tuple[int, int]:
    last = day_of(clock.now())
    return last - query.days + 1, last


def _together(figures: Iterable[Came]) -> Came:
    whole = NOTHING
    for each in figures:
        whole = whole.plus(each)
    return whole


def _per_task(figures: Came) -> float | None:
    """USD for each completed task, if there is one."""
    return usd(round(figures.cost_micro / figures.completed)) if figures.completed else None


def _total(rows: Iterable[tuple[str, str, Came]]) -> float:
    return usd(sum(figures.cost_micro for _, _, figures in rows))


def _part(rows: list[tuple[str, str, Came]], query: RankedQuery, make: Callable[[tuple[str, str, Came]], T]) -> Page[T]:
    items = [make(row) for row in rows[query.offset : query.offset + query.limit]]
    return Page(items=items, total=len(rows), limit=query.limit, offset=query.offset, next=None)
