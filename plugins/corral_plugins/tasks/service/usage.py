"""What attempts use: a worker tells totals, the gateway one call after the other; the task's cost grows by both."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.errors import NotFound
from corral_plugins.tasks.api import Usage
from corral_plugins.tasks.models import Attempt
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import Ledger, Row


def record(row: Row, attempt: Ledger, used: Usage | None) -> None:
    """Keep what a worker tells of an attempt, live or not."""
    changes = grown(row, attempt, used)
    if changes:
        rows.change(row, changes)


def grown(row: Row, attempt: Ledger, used: Usage | None) -> dict[str, Any]:
    """Keep what is new in a worker's totals; the columns that the locked task must change with them."""
    if used is None:
        return {}
    before: dict[str, int] = rows.parsed(attempt.told) or {}
    totals = _columns(used)
    more = {name: total - before.get(name, 0) for name, total in totals.items() if total > before.get(name, 0)}
    if not more:
        return {}
    attempt.told = msgspec.json.encode({**before, **{name: totals[name] for name in more}}).decode()
    Attempt.update(told=msgspec.Raw(attempt.told.encode())).where(Attempt.id == attempt.id).execute()
    return _add(row, attempt, more)


def add(task_id: str, lease_id: str, used: Usage) -> None:
    """Keep what one call of the gateway used, whether the lease still lives or not."""
    try:
        row = rows.lock(task_id)
    except NotFound:
        return
    attempt = rows.of_lease(lease_id)
    if attempt is not None and attempt.task_id == task_id:
        rows.change(row, _add(row, attempt, {name: n for name, n in _columns(used).items() if n}))


def _columns(used: Usage) -> dict[str, int]:
    """By column. Tokens without a price are counted as such."""
    found = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": used.calls}
    if isinstance(used.cost_usd, msgspec.UnsetType):
        return {**found, "unpriced_tokens": used.input_tokens + used.output_tokens}
    return {**found, "cost_micro": round(used.cost_usd * 1e6)}


def _add(row: Row, attempt: Ledger, more: dict[str, int]) -> dict[str, Any]:
    rows.add_usage(attempt, more)
    return {name: getattr(row, name) + n for name, n in more.items()}
