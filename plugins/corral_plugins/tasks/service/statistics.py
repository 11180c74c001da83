"""Statistics of agents, computed from their attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral.database.dialect import execute, milliseconds_between
from corral_plugins.agents.api import AttemptStatistics

NEWEST = 10_000
"""The maximum number of attempts that are read.

An agent may have a million attempts, and a unit of work is limited to two seconds.
"""
# `ms` is the duration of an attempt that was completed or failed; it is null for every other attempt.
_STATISTICS = """
WITH newest AS (
  SELECT agent_id, agent_version, status, cost_micro, input_tokens, output_tokens, stalls, started_at, finished_at
  FROM tasks_attempts WHERE agent_id = ? AND created_at >= ? ORDER BY created_at DESC LIMIT {newest}
), ended AS (
  SELECT newest.*, CASE WHEN status IN ('completed', 'failed') THEN {ms} END AS ms FROM newest
), placed AS (
  SELECT ended.*, CUME_DIST() OVER (PARTITION BY {group}, ms IS NULL ORDER BY ms) AS place FROM ended
)
SELECT {group}, COUNT(*), SUM(CASE WHEN status = 'completed' THEN 1 ELSE 0 END),
  SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END), AVG(ms), MIN(CASE WHEN place >= 0.95 THEN ms END),
  SUM(cost_micro), SUM(input_tokens), SUM(output_tokens), SUM(stalls)
FROM placed GROUP BY {group}
"""


class AgentStatisticsService:
    """Implements `AgentStatistics` with one query per call over the newest attempts of one agent.

    An attempt is one claim. The success rate and the durations include only attempts that were completed or failed,
    because an attempt that was cancelled, released or made to wait says nothing about the agent.
    """

    def of_agent(self, agent_id: str, *, since: str) -> AttemptStatistics:
        found = _run("agent_id", agent_id, since)
        return _statistics(found[0]) if found else _statistics((0,) * 10)

    def of_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        found = {int(row[0]): _statistics(row) for row in _run("agent_version", agent_id, "")}
        is_whole = sum(statistics.attempts or 0 for statistics in found.values()) < NEWEST
        absent = _statistics((0,) * 10) if is_whole else AttemptStatistics()
        return {version: found.get(version, absent) for version in versions}


def _run(group: str, agent_id: str, since: str) -> list[tuple[Any, ...]]:
    sql = _STATISTICS.format(ms=milliseconds_between("started_at", "finished_at"), newest=NEWEST, group=group)
    found: list[tuple[Any, ...]] = execute(sql, [agent_id, since]).fetchall()
    return found


def _statistics(row: Sequence[Any]) -> AttemptStatistics:
    _, attempts, completed, failed, average, p95, cost, tokens_in, tokens_out, stalls = row
    ended = completed + failed
    return AttemptStatistics(
        attempts=attempts,
        completed=completed,
        failed=failed,
        success_rate=completed / ended if ended else None,
        avg_duration_ms=round(average) if ended and average is not None else None,
        p95_duration_ms=int(p95) if ended and p95 is not None else None,
        cost_usd=float(cost) / 1e6,
        input_tokens=int(tokens_in),
        output_tokens=int(tokens_out),
        stalls=int(stalls),
    )
