"""Lists, reads, compares and rolls back versions of an agent's configuration, and reads statistics of its attempts."""

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
from corral_plugins.agents.models import Version
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.rows import exists, writable
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

    Statistics are null without the plugin that stores attempts.
    """

    statistics: AgentStatistics | None

    def __init__(self, management: AgentManagement) -> None:
        self._management = management

    def list(self, agent_id: str, query: VersionQuery, *, by: Principal) -> Page[AgentVersionView]:
        """Return a page of the versions, newest first, without their configurations."""
        exists(agent_id, by)
        rows = Version.select(Version.n, Version.changed_fields, Version.created_by, Version.created_at).where(
            Version.agent_id == agent_id
        )
        page = paginate(rows, query, by, scope=f"agent_versions:{agent_id}", order=(Order(Version.n),), make=_same)
        statistics = self._statistics(agent_id, [row.n for row in page.items])
        items = [AgentVersionView(**_facts(row, statistics.get(row.n, UNKNOWN))) for row in page.items]
        return Page(items=items, total=page.total, limit=page.limit, offset=page.offset, next=page.next)

    def get(self, agent_id: str, n: int, *, by: Principal) -> AgentVersionDetail:
        """Return one version with its configuration. Raises `NotFound`."""
        exists(agent_id, by)
        row = _version(agent_id, n)
        statistics = self._statistics(agent_id, [n]).get(n, UNKNOWN)
        return AgentVersionDetail(**_facts(row, statistics), configuration=row.configuration)

    def compare(self, agent_id: str, before: int, after: int, *, by: Principal) -> Comparison:
        """Return the fields that differ between two versions, by name. Raises `NotFound`."""
        exists(agent_id, by)
        one, other = _version(agent_id, before).configuration, _version(agent_id, after).configuration
        diff = [
            FieldDifference(field=field, before=one.get(field), after=other.get(field))
            for field in sorted(one.keys() | other.keys())
            if one.get(field) != other.get(field)
        ]
        statistics = self._statistics(agent_id, [before, after])
        return Comparison(
            diff=diff, stats=ComparedStatistics(before=statistics.get(before), after=statistics.get(after))
        )

    def roll_back(self, agent_id: str, n: int, match: IfMatch = ANY_VERSION, *, by: Principal) -> AgentView:
        """Create a new version with the content of version `n`.

        Raises `NotFound`, or `Conflict` if nothing would change.
        """
        row = writable(agent_id, by)
        match.check(row.version)
        wanted = msgspec.convert(_version(agent_id, n).configuration, AgentPatch)
        now = IfMatch(version=row.version) if match.version is not None else match
        view = self._management.update(agent_id, wanted, now, by=by)
        if view.version == row.version:
            raise Conflict(
                f"Version {n} is already the current configuration; there is nothing to roll back.",
                current_status=view.status,
            )
        return view

    def stats(self, agent_id: str, days: int, *, by: Principal) -> AgentStats:
        """Return statistics of the attempts of the last `days` days. Raises `NotFound`."""
        exists(agent_id, by)
        since = clock.now(-days * DAY_SECONDS)
        statistics = self.statistics.of_agent(agent_id, since=since) if self.statistics is not None else UNKNOWN
        return AgentStats(days=days, **msgspec.structs.asdict(statistics))

    def _statistics(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        if self.statistics is None or not versions:
            return {}
        return self.statistics.of_versions(agent_id, versions)


def _version(agent_id: str, n: int) -> Version:
    row: Version | None = Version.get_or_none((Version.agent_id == agent_id) & (Version.n == n))
    if row is None:
        raise NotFound(f"The agent has no version {n}.")
    return row


def _same(row: Version) -> Version:
    return row


def _facts(row: Version, statistics: AttemptStatistics) -> dict[str, Any]:
    return {
        "n": row.n,
        "changed_fields": row.changed_fields,
        "by": row.created_by,
        "at": row.created_at,
        "attempts": statistics.attempts,
        "success_rate": statistics.success_rate,
        "cost_usd": statistics.cost_usd,
    }
