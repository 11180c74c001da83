"""How agents did, from the ledger of attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral.database.unit import current
from corral_plugins.agents.api import WorkFigures

_SQLITE_MS = "CAST(ROUND((julianday({until}) - julianday({since})) * 86400000) AS INTEGER)"
_POSTGRES_MS = (
    "CAST(ROUND(EXTRACT(EPOCH FROM (CAST({until} AS timestamptz) - CAST({since} AS timestamptz))) * 1000) AS BIGINT)"
)
# `ms` is of an attempt that ran to a result or a failure; null for every other.
_FIGURES = """
WITH ended AS (
  SELECT agent_id, agent_version, status, cost_micro, input_tokens, output_tokens, stalls,
    CASE WHEN status IN ('completed', 'failed') THEN {ms} END AS ms
  FROM tasks_attempts WHERE agent_id = {mark} AND {which}
), placed AS (
  SELECT ended.*, CUME_DIST() OVER (PARTITION BY {group}, ms IS NULL ORDER BY ms) AS place FROM ended
)
SELECT {group}, COUNT(*), SUM(CASE WHEN status = 'completed' THEN 1 ELSE 0 END),
  SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END), AVG(ms), MIN(CASE WHEN place >= 0.95 THEN ms END),
  SUM(cost_micro), SUM(input_tokens), SUM(output_tokens), SUM(stalls)
FROM placed GROUP BY {group}
"""


class Record:
    """Implements `AgentRecord`: one query each, over the attempts of one agent.

    An attempt is a claim. The rate and the durations are of attempts that were completed or failed; those that were
    cancelled, given back or made to wait say nothing about the agent.
    """

    def figures(self, agent_id: str, *, since: str) -> WorkFigures:
        found = _run("created_at >= {mark}", "agent_id", [agent_id, since])
        return _figures(found[0]) if found else _figures((0,) * 10)

    def figures_of_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, WorkFigures]:
        wanted = sorted(set(versions))
        if not wanted:
            return {}
        listed = ", ".join(["{mark}"] * len(wanted))
        found = _run(f"agent_version IN ({listed})", "agent_version", [agent_id, *wanted])
        none = _figures((0,) * 10)
        return {**dict.fromkeys(wanted, none), **{int(row[0]): _figures(row) for row in found}}


def milliseconds(since: str, until: str) -> str:
    """SQL of the time between two columns; null when one is."""
    return (_SQLITE_MS if current().database.kind == "sqlite" else _POSTGRES_MS).format(since=since, until=until)


def _run(which: str, group: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
    unit = current()
    mark = "?" if unit.database.kind == "sqlite" else "%s"
    ms = milliseconds("started_at", "finished_at")
    sql = _FIGURES.format(ms=ms, mark=mark, which=which.format(mark=mark), group=group)
    found: list[tuple[Any, ...]] = unit.connection.execute(sql, parameters).fetchall()
    return found


def _figures(row: Sequence[Any]) -> WorkFigures:
    _, attempts, completed, failed, average, p95, cost, tokens_in, tokens_out, stalls = row
    ended = completed + failed
    return WorkFigures(
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
