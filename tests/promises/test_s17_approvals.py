"""S17: 50 parallel decisions on one approval, and arguments that change after people have read them.

Short form: 3 approvals and 10 changed calls; long form (`--long`): 40 approvals and 200 changed calls. Of the decisions
on one approval exactly one is answered 200, and nothing runs with other arguments than those that were approved.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.approvals.conftest import Desk

from corral.errors import Conflict
from corral_plugins.approvals.api import Approvals

DECISIONS = 50


async def race(desk: Desk, approval: str) -> str:
    """Decide an approval many times at once; what was decided."""
    people = [desk.member, desk.other, desk.admin]
    verbs = [random.choice(("approve", "reject")) for _ in range(DECISIONS)]
    calls = [people[n % 3].post(f"/approvals/{approval}/{verb}") for n, verb in enumerate(verbs)]
    answers = await asyncio.gather(*calls)
    won = [verb for verb, answer in zip(verbs, answers, strict=True) if answer.status == 200]
    assert len(won) == 1, f"{len(won)} decisions on one approval count"
    assert {answer.status for answer in answers} <= {200, 409}, {answer.status for answer in answers}
    return won[0]


async def test_s17_one_decision_counts_and_nothing_else_runs(
    make_kit: Any, long_form: bool, figure: Callable[[str, dict[str, Any]], None]
) -> None:
    desk = await Desk().set_up(make_kit)
    races, changes = (40, 200) if long_form else (3, 10)
    for _ in range(races):
        _, approval = await desk.waiting()
        decided = await race(desk, approval)
        assert (await desk.read(approval))["status"] == {"approve": "approved", "reject": "rejected"}[decided]
    approvals = desk.kit.service(Approvals)
    for n in range(changes):
        asked = await desk.ask(payload={"amount": n})
        read = asked["payload_sha256"]
        revised = await desk.member.post(f"/approvals/{asked['id']}/revise", {"payload": {"amount": n + 1}})
        assert revised.status == 200, revised
        stale = await desk.other.post(f"/approvals/{asked['id']}/approve", {"payload_sha256": read})
        assert stale.status == 412, "a decision about other content counts"
        fresh = revised.json()["payload_sha256"]
        assert (await desk.other.post(f"/approvals/{asked['id']}/approve", {"payload_sha256": fresh})).status == 200
        with pytest.raises(Conflict):
            await desk.kit.work(lambda: approvals.consume(asked["id"], payload_sha256=read))  # noqa: B023
        ran = await desk.kit.work(lambda: approvals.consume(asked["id"], payload_sha256=fresh))  # noqa: B023
        assert ran == {"amount": n + 1}, "something else ran than was approved"
        with pytest.raises(Conflict):
            await desk.kit.work(lambda: approvals.consume(asked["id"], payload_sha256=fresh))  # noqa: B023
    figure("S17", {"approvals": races, "decisions": races * DECISIONS, "changed": changes, "wrong": 0})
