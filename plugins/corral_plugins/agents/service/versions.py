"""Lists, reads, compares and restores versions of an agent's configuration, and reads the agent's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, NotFound
from corral.http.answers import ANY_VERSION, IfMatch
from corral.http.page import Order, Page, paginate
from corral_plugins.agents.api import AgentStatistics, AttemptStatistics
from corral_plugins.agents.models import AgentVersion
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.rows import find_writable_agent, require_readable_agent
from corral_plugins.agents.shapes import (
    AgentPatch,
    AgentStats,
    AgentVersionDetail,
    AgentVersionView,
    AgentView,
    ComparedStatistics,
    Comparison,
    FieldDifference,
    VersionQuery,
)

UNKNOWN = AttemptStatistics()
DAY_SECONDS = 86_400


class AgentVersions:
    """The versions and statistics of agents. Every method runs in the caller's unit of work.

    Statistics are null if the `tasks` plugin is not active.
    """

    statistics: AgentStatistics | None

    def __init__(self, management: AgentManagement) -> None:
        self._management = management

    def list(self, agent_id: str, query: VersionQuery, *, by: Principal) -> Page[AgentVersionView]:
        """Return a page of the versions, newest first, without their configurations."""
        require_readable_agent(agent_id, by)
        rows = AgentVersion.select(
            AgentVersion.n, AgentVersion.changed_fields, AgentVersion.created_by, AgentVersion.created_at
        ).where(AgentVersion.agent_id == agent_id)
        page = paginate(
            rows, query, by, scope=f"agent_versions:{agent_id}", order=(Order(AgentVersion.n),), make=_unchanged
        )
        statistics = self._statistics_of(agent_id, [row.n for row in page.items])
        items = [AgentVersionView(**_view_fields(row, statistics.get(row.n, UNKNOWN))) for row in page.items]
        return Page(items=items, total=page.total, limit=page.limit, offset=page.offset, next=page.next)

    def get(self, agent_id: str, n: int, *, by: Principal) -> AgentVersionDetail:
        """Return one version with its configuration. Raise `NotFound` if the agent or the version does not exist."""
        require_readable_agent(agent_id, by)
        row = _find_version(agent_id, n)
        statistics = self._statistics_of(agent_id, [n]).get(n, UNKNOWN)
        return AgentVersionDetail(**_view_fields(row, statistics), configuration=row.configuration)

    def compare(self, agent_id: str, before: int, after: int, *, by: Principal) -> Comparison:
        """Return the fields that differ between two versions, sorted by name, and statistics about both versions.

        Raise `NotFound` if the agent or one of the versions does not exist.
        """
        require_readable_agent(agent_id, by)
        one, other = _find_version(agent_id, before).configuration, _find_version(agent_id, after).configuration
        diff = [
            FieldDifference(field=field, before=one.get(field), after=other.get(field))
            for field in sorted(one.keys() | other.keys())
            if one.get(field) != other.get(field)
        ]
        statistics = self._statistics_of(agent_id, [before, after])
        return Comparison(
            diff=diff, stats=ComparedStatistics(before=statistics.get(before), after=statistics.get(after))
        )

    def roll_back(self, agent_id: str, n: int, match: IfMatch = ANY_VERSION, *, by: Principal) -> AgentView:
        """Create a new version with the content of version `n`.

        Raise `NotFound` if the agent or the version does not exist, or `Conflict` if the current configuration is the
        same.
        """
        row = find_writable_agent(agent_id, by)
        match.check(row.version)
        wanted = msgspec.convert(_find_version(agent_id, n).configuration, AgentPatch)
        now = IfMatch(version=row.version) if match.version is not None else match
        view = self._management.update(agent_id, wanted, now, by=by)
        if view.version == row.version:
            raise Conflict(
                f"Version {n} is already the current configuration; there is nothing to roll back.",
                current_status=view.status,
            )
        return view

    def get_statistics(self, agent_id: str, days: int, *, by: Principal) -> AgentStats:
        """Return statistics about the agent's attempts in the last `days` days.

        Raise `NotFound` if the agent does not exist.
        """
        require_readable_agent(agent_id, by)
        since = clock.now(-days * DAY_SECONDS)
        statistics = self.statistics.for_agent(agent_id, since=since) if self.statistics is not None else UNKNOWN
        return AgentStats(days=days, **msgspec.structs.asdict(statistics))

    def _statistics_of(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        if self.statistics is None or not versions:
            return {}
        return self.statistics.for_versions(agent_id, versions)


def _find_version(agent_id: str, n: int) -> AgentVersion:
    row: AgentVersion | None = AgentVersion.get_or_none((AgentVersion.agent_id == agent_id) & (AgentVersion.n == n))
    if row is None:
        raise NotFound(f"The agent has no version {n}.")
    return row


def _unchanged(row: AgentVersion) -> AgentVersion:
    return row


def _view_fields(row: AgentVersion, statistics: AttemptStatistics) -> dict[str, Any]:
    return {
        "n": row.n,
        "changed_fields": row.changed_fields,
        "by": row.created_by,
        "at": row.created_at,
        "attempts": statistics.attempts,
        "success_rate": statistics.success_rate,
        "cost_usd": statistics.cost_usd,
    }
