"""What a call costs the database: its units of work, those that wait for the disk, and its statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from corral.database.unit import Unit

pytestmark = pytest.mark.one_engine

MAX_STATEMENTS = 14  # of both units, about calls, slots, providers and costs


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any]) -> Any:
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_has_two_units_and_one_waits_for_the_disk(
    kit: Any, upstream: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = await kit.as_user("member")
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    for _ in range(3):  # fills the caches
        assert (await alice.post("/llm/chat/completions", body)).status == 200
    database = kit.kernel.database
    finish, units, statements = Unit.finish, [], []

    def counted(unit: Unit) -> None:
        finish(unit)
        if unit.entry.label == "llm chat":
            units.append(unit.entry.durable)

    def trace(text: str) -> None:
        if '"llm_' in text or '"cost_' in text:
            statements.append(text)

    connections = [thread.connection for pool in database.pools for thread in pool.threads if thread.connection]
    monkeypatch.setattr(Unit, "finish", counted)
    for connection in connections:
        connection.set_trace_callback(trace)
    assert (await alice.post("/llm/chat/completions", body)).status == 200
    for connection in connections:
        connection.set_trace_callback(None)
    assert units == [False, True]
    assert len(statements) <= MAX_STATEMENTS, statements
