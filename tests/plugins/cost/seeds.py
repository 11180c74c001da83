"""Inserts many events at once, with the rollups that settling each of them would have written."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import peewee

from corral import clock
from corral.database.unit import current
from corral.ids import new_id
from corral_plugins.cost.models import CostEvent
from corral_plugins.cost.service import rollups

MODELS = (("openai", "gpt-4o"), ("openai", "gpt-4o-mini"), ("anthropic", "claude-sonnet-4-5"), ("local", "small"))
CHUNK = 1000


def rows(count: int, *, days: int, agents: int = 20, users: int = 10, calls_a_task: int = 10, seed: int = 1) -> Any:
    """Yield `count` events, spread evenly over the last `days`, oldest first."""
    random_numbers = random.Random(seed)
    ids = {kind: [new_id() for _ in range(n)] for kind, n in (("agent", agents), ("user", users))}
    now, span = clock.time_s(), days * 86_400
    task = agent = ""
    for n in range(count):
        if n % calls_a_task == 0:
            task, agent = new_id(), random_numbers.choice(ids["agent"])
        provider, model = random_numbers.choice(MODELS)
        is_private = n % 50 == 0
        user = random_numbers.choice(ids["user"])
        yield {
            "id": new_id(),
            "ts": clock.format_instant(now - span + span * n / count),
            "usage_key": f"seed-{seed}-{n}",
            "private_to": user if is_private else None,
            "user_id": user,
            "agent_id": None if is_private else agent,
            "task_id": None if is_private else task,
            "attempt_id": None,
            "run_id": None,
            "conversation_id": None,
            "provider": provider,
            "model": model,
            "operation": "chat",
            "input_tokens": random_numbers.randrange(5000),
            "output_tokens": random_numbers.randrange(500),
            "cache_read_tokens": 10,
            "cache_write_tokens": 5,
            "cost_micro": None if n % 100 == 7 else random_numbers.randrange(100_000),
            "price_source": "reported",
            "price_version": None,
            "estimated": False,
            "note": "",
            "by_gateway": False,
        }


async def fill(kit: Any, count: int, **shape: Any) -> None:
    """Insert the events and their rollups."""
    merged: dict[rollups.RollupKey, Counter[str]] = {}
    batch: list[dict[str, Any]] = []
    seen: set[tuple[Any, Any]] = set()
    for row in rows(count, **shape):
        batch.append(row)
        increments = rollups.increments_of(row)
        for key in rollups.keys_of(row):
            merged.setdefault(key, Counter()).update(increments)
            if key.series == rollups.AGENT and row["task_id"] and (row["task_id"], row["agent_id"]) not in seen:
                seen.add((row["task_id"], row["agent_id"]))
                merged[key]["tasks"] += 1
        if len(batch) == CHUNK:
            await kit.kernel.database.work(lambda batch=batch: _insert(batch))
            batch = []
    if batch:
        await kit.kernel.database.work(lambda: _insert(batch))
    keys = sorted(merged)
    for start in range(0, len(keys), 2 * CHUNK):
        chunk = {key: merged[key] for key in keys[start : start + 2 * CHUNK]}
        await kit.kernel.database.work(lambda chunk=chunk: rollups.increment_rollups(chunk))


def _insert(batch: list[dict[str, Any]]) -> None:
    """Insert without peewee, which would take minutes for a million rows."""
    names = list(batch[0])
    fields: dict[str, peewee.Field] = CostEvent._meta.fields
    unit = current()
    mark = "?" if unit.database.kind == "sqlite" else "%s"
    sql = f"INSERT INTO cost_events ({', '.join(names)}) VALUES ({', '.join([mark] * len(names))})"
    cursor = unit.connection.cursor()
    cursor.executemany(sql, [[fields[name].db_value(row[name]) for name in names] for row in batch])
