"""Tests that the example plugin meets the plugin contract and works in a real kernel with each database engine."""

from __future__ import annotations

import asyncio
from typing import Any

from corral_hello.plugin import HelloPlugin

from corral.testing.conformance import check_plugin


def test_the_contract_is_kept() -> None:
    report = check_plugin(HelloPlugin)
    assert report.ok, report


async def test_it_greets_and_counts(make_kit: Any) -> None:
    kit = await make_kit(plugins=[HelloPlugin])
    member, viewer = await kit.as_user("member"), await kit.as_user("viewer")
    answers = await asyncio.gather(*[member.post("/hello", {"name": "world"}) for _ in range(5)])
    assert {answer.status for answer in answers} == {200}
    assert sorted(answer.json()["times"] for answer in answers) == [1, 2, 3, 4, 5]
    assert answers[0].json()["greeting"] == "Hello, world!"
    assert (await viewer.post("/hello", {"name": "world"})).status == 403
    assert [event.type for event in await kit.events()].count("hello.greeted") == 5
    assert "corral_hello_names 1.0" in (await kit.client.get("/metrics", root=True)).body.decode()
