"""The limits set by budgets, and a cache of these limits.

Inside a unit of work, the cached limits are current, because the unit first reads a revision number that changes
whenever a limit changes. Frequently used SQL statements compare or return this revision themselves, which saves an
additional statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

from corral.database.engine import Database
from corral.database.statement import Statement
from corral.database.unit import SYSTEM_CONTEXT, after_commit, current
from corral_plugins.cost.models import AgentLimit, Budget

BUDGET_ID = 1
GLOBAL, AGENT = "global", "agent"

REVISION = Budget.select(Budget.revision).where(Budget.id == BUDGET_ID)
"""The query for the revision of the limits. Its result is null if no limit was ever set."""

_REVISION = Statement(lambda p: REVISION.tuples())


class BudgetConfiguration(msgspec.Struct, frozen=True, kw_only=True):
    """The budget of the installation, as admins configure it. A `monthly_limit_micro` of None means no limit."""

    monthly_limit_micro: int | None = None
    alert_thresholds: tuple[int, ...] = (50, 80, 100)
    mode: str = "hard"
    on_exceeded: str = "finish_running"
    timezone: str = "UTC"


class Limit(NamedTuple):
    """A limit on the costs in a period. `key` is the id of the agent, or empty for the installation.

    If `is_hard` is false, exceeding the limit raises alerts but blocks nothing.
    """

    scope: str
    key: str
    limit_micro: int
    is_hard: bool


class BudgetLimits:
    """All limits as of a revision number, which changes whenever a limit changes.

    `known` contains the `(scope, key, period)` of counters that are known to exist.
    """

    def __init__(self, revision: int, configuration: BudgetConfiguration, agents: Mapping[str, int]) -> None:
        self.revision, self.configuration, self.agents = revision, configuration, agents
        self.zone = ZoneInfo(configuration.timezone)
        self.known: set[tuple[str, str, str]] = set()
        limit, mode = configuration.monthly_limit_micro, configuration.mode
        self.overall = None if limit is None or mode == "off" else Limit(GLOBAL, "", limit, mode == "hard")

    @property
    def is_unlimited(self) -> bool:
        """Whether there is no limit at all."""
        return self.overall is None and not self.agents

    def of(self, agent_id: str | None) -> list[Limit]:
        """Return the limits that apply to the agent's costs, beginning with the installation's limit."""
        found = [] if self.overall is None else [self.overall]
        if agent_id is not None and agent_id in self.agents:
            found.append(Limit(AGENT, agent_id, self.agents[agent_id], True))
        return found

    def all(self) -> list[Limit]:
        """Return all limits."""
        return [*self.of(None), *(Limit(AGENT, key, limit, True) for key, limit in sorted(self.agents.items()))]


NO_LIMITS = BudgetLimits(0, BudgetConfiguration(), {})


class _ReadInUnit:
    """The limits and counter states that a unit of work has read."""

    def __init__(self, limits: BudgetLimits) -> None:
        self.limits = limits
        self.states: dict[Limit, Any] = {}


class BudgetLimitCache:
    """The limits in force. There is one instance per kernel."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.cached = NO_LIMITS
        """The limits that this process read last. Changes by other processes may be missing."""

    def current(self) -> BudgetLimits:
        """Return the limits that apply in the current unit of work. Each unit of work reads their revision once."""
        return self._limits_of_unit() or self.reload()

    def probable_limits(self, agent_id: str | None) -> BudgetLimits:
        """Return the limits from memory, or from the database if no limit in memory applies to the agent.

        Limits from memory may be outdated.

        The caller must either compare the revision of the limits with the database, or rely on a row that exists only
        if a limit exists.
        """
        limits = self._limits_of_unit() or self.cached
        return limits if limits.of(agent_id) else self.current()

    def _limits_of_unit(self) -> BudgetLimits | None:
        read = self._read_in_unit()
        return None if read is None else read.limits

    def _read_in_unit(self) -> _ReadInUnit | None:
        return current().memo.get(self)

    def reload(self) -> BudgetLimits:
        """Read the limits again, because the current unit of work may have changed them."""
        row = _REVISION.one({})
        return self.confirm(None if row is None else row[0])

    def confirm(self, read: int | None) -> BudgetLimits:
        """Return the limits with the revision that the current unit of work has just read from the database."""
        revision = 0 if read is None else int(read)
        limits = self._limits_of_unit() or self.cached
        if revision != limits.revision:
            limits = _read_limits(revision)
            after_commit(lambda: self._replace(limits))
        self.adopt(limits)
        return limits

    def adopt(self, limits: BudgetLimits) -> None:
        """Use these limits in the current unit of work.

        The unit of work must have compared their revision with the database.
        """
        current().memo.setdefault(self, _ReadInUnit(limits)).limits = limits

    @property
    def pending_states(self) -> dict[Limit, Any]:
        """The counter states that will result from the changes at the end of the current unit of work."""
        read = self._read_in_unit()
        return {} if read is None else read.states

    async def refresh(self) -> None:
        """Read the limits again if another process changed them."""
        self._replace(await self._database.read(self.current, SYSTEM_CONTEXT))

    def _replace(self, limits: BudgetLimits) -> None:
        if limits.revision > self.cached.revision:
            self.cached = limits


def _read_limits(revision: int) -> BudgetLimits:
    configuration = configuration_of(Budget.get_or_none(Budget.id == BUDGET_ID))
    agents: Any = AgentLimit.select(AgentLimit.agent_id, AgentLimit.limit_micro).tuples()
    return BudgetLimits(revision, configuration, dict(agents))


def configuration_of(row: Budget | None) -> BudgetConfiguration:
    """Return the configuration in the budget row, or the default configuration if there is no row."""
    if row is None:
        return BudgetConfiguration()
    return BudgetConfiguration(
        monthly_limit_micro=row.monthly_limit_micro,
        alert_thresholds=tuple(row.alert_thresholds),
        mode=row.mode,
        on_exceeded=row.on_exceeded,
        timezone=row.timezone,
    )


def increment_revision() -> None:
    """Increment the revision of the limits, so that every process reads them again.

    Call this function in the unit of work that changes a limit. The function locks the budget row.
    """
    defaults = msgspec.structs.asdict(BudgetConfiguration())
    values = {**defaults, "alert_thresholds": list(defaults["alert_thresholds"]), "id": BUDGET_ID}
    Budget.insert(**values).on_conflict(
        conflict_target=[Budget.id], update={Budget.revision: Budget.revision + 1}
    ).execute()
