"""What attempts use: a worker tells totals or single uses, the gateway one call after the other.

The task's own deltas grows by all of it; what workers tell becomes cost events besides.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import msgspec

from corral.errors import NotFound
from corral_plugins.cost.api import Charged, Cost, Spent
from corral_plugins.tasks.models import Attempt
from corral_plugins.tasks.reports import Usage, UsageItem, Used
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import AttemptRow, TaskRow

OUTSIDE = "worker"
"""The provider of totals, which name none."""


class Usages:
    """Joins the caller's unit."""

    cost: Cost | None

    def record(self, row: TaskRow, attempt: AttemptRow, used: Used | None) -> None:
        """Keep what a worker tells of an attempt, live or not."""
        changes = self.grown(row, attempt, used)
        if changes:
            rows.change(row, changes)

    def grown(self, row: TaskRow, attempt: AttemptRow, used: Used | None) -> dict[str, Any]:
        """Keep what is new of it; the columns that the locked task must change with it."""
        if used is None:
            return {}
        more = self._items(attempt, used) if isinstance(used, list) else self._totals(attempt, used)
        return _add(row, attempt, more) if more else {}

    def _totals(self, attempt: AttemptRow, used: Usage) -> dict[str, int]:
        before: dict[str, Any] = rows.parsed(attempt.told) or {}
        totals = _columns(used)
        more = {name: total - before.get(name, 0) for name, total in totals.items() if total > before.get(name, 0)}
        if not more:
            return {}
        _tell(attempt, {**before, **{name: totals[name] for name in more}})
        tokens = {name: more[name] for name in ("input_tokens", "output_tokens") if name in more}
        if self.cost is None or not (tokens or "cost_micro" in more):
            return more
        cost = Decimal(more["cost_micro"]) / 1_000_000 if "cost_micro" in more else None
        key = ":".join((attempt.id, *(f"{name}={total}" for name, total in sorted(totals.items()))))
        charged = self.cost.settle(
            Spent(
                usage_key=key, provider=OUTSIDE, model="", operation="other", cost_usd=cost, **tokens, **_whose(attempt)
            )
        )
        return {**{name: n for name, n in more.items() if name not in _PRICES}, **_price(charged, sum(tokens.values()))}

    def _items(self, attempt: AttemptRow, used: list[UsageItem]) -> dict[str, int]:
        more: Counter[str] = Counter()
        for item in used if self.cost is not None else _unknown(attempt, used):
            charged = None if self.cost is None else self.cost.settle(_spent(item, attempt))
            if charged is not None and charged.repeated:
                continue
            read = item.input_tokens + item.cache_read_tokens + item.cache_write_tokens  # the deltas has one figure
            more.update(calls=1, input_tokens=read, output_tokens=item.output_tokens)
            tokens = read + item.output_tokens
            more.update(_price(charged, tokens) if charged is not None else _told_price(item, tokens))
        return {name: n for name, n in more.items() if n}


_PRICES = ("cost_micro", "unpriced_tokens")


def _tell(attempt: AttemptRow, told: dict[str, Any]) -> None:
    """Remember what the worker has told, so that a repeat adds nothing."""
    attempt.told = msgspec.json.encode(told).decode()
    Attempt.update(told=msgspec.Raw(attempt.told.encode())).where(Attempt.id == attempt.id).execute()


def _unknown(attempt: AttemptRow, used: list[UsageItem]) -> list[UsageItem]:
    """Without cost events, the attempt remembers the keys itself."""
    before: dict[str, Any] = rows.parsed(attempt.told) or {}
    known = set(before.get("keys", ()))
    new = list({item.usage_key: item for item in used if item.usage_key not in known}.values())
    if new:
        _tell(attempt, {**before, "keys": sorted(known | {item.usage_key for item in new})})
    return new


def _spent(item: UsageItem, attempt: AttemptRow) -> Spent:
    given = msgspec.structs.asdict(item)
    cost = None if item.cost_usd is None else Decimal(repr(item.cost_usd))
    return Spent(**{**given, "cost_usd": cost}, **_whose(attempt))


def _whose(attempt: AttemptRow) -> dict[str, Any]:
    return {
        "task_id": attempt.task_id,
        "attempt_id": attempt.id,
        "agent_id": attempt.agent_id,
        "user_id": attempt.requester_id,
    }


def _price(charged: Charged, tokens: int) -> dict[str, int]:
    """By column: what it costs, or the tokens that have no price."""
    return {"unpriced_tokens": tokens} if charged.cost_micro_usd is None else {"cost_micro": charged.cost_micro_usd}


def _told_price(item: UsageItem, tokens: int) -> dict[str, int]:
    return {"unpriced_tokens": tokens} if item.cost_usd is None else {"cost_micro": round(item.cost_usd * 1e6)}


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


def _add(row: TaskRow, attempt: AttemptRow, more: dict[str, int]) -> dict[str, Any]:
    rows.add_usage(attempt, more)
    return {name: getattr(row, name) + n for name, n in more.items()}
