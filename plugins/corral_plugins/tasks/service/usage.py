"""What attempts use: a worker tells totals, the task's cost grows by what is new in them."""

from __future__ import annotations

from typing import Any

import msgspec

from corral_plugins.tasks.api import Usage
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import Ledger, Row


def record(row: Row, attempt: Ledger, used: Usage | None) -> None:
    """Keep what an attempt, live or not, has used."""
    changes = grown(row, attempt, used)
    if changes:
        rows.change(row, changes)


def grown(row: Row, attempt: Ledger, used: Usage | None) -> dict[str, Any]:
    """Keep the attempt's totals; the columns that the locked task must change with them."""
    if used is None:
        return {}
    cost = used.cost_usd
    is_priced = not isinstance(cost, msgspec.UnsetType)
    totals = {
        "cost_micro": round(cost * 1e6) if not isinstance(cost, msgspec.UnsetType) else attempt.cost_micro,
        "unpriced_tokens": attempt.unpriced_tokens if is_priced else used.input_tokens + used.output_tokens,
        "input_tokens": used.input_tokens,
        "output_tokens": used.output_tokens,
        "calls": used.calls,
    }
    more = {name: total - getattr(attempt, name) for name, total in totals.items() if total > getattr(attempt, name)}
    if more:
        rows.add_usage(attempt, more)
    return {name: getattr(row, name) + n for name, n in more.items()}
