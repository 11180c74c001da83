"""Templates carry the review policies of agents and workflows, and their reviewers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.marketplace.conftest import PLUGINS, Market, objects


@pytest.fixture
async def market(make_kit: Callable[..., Any]) -> Market:
    """A marketplace with code reviews."""
    kit = await make_kit(plugins=(*PLUGINS, "code_reviews"))
    return Market(kit, await kit.as_user("member"), await kit.as_user("admin"))


@pytest.mark.one_engine
async def test_an_exported_policy_names_the_reviewer_that_is_installed_with_it(market: Market) -> None:
    reviewer = await market.ok("POST", "/agents", {"name": "Reviewer"})
    policy = {"mode": "agent", "reviewer_agent_id": reviewer["id"]}
    author = await market.ok("POST", "/agents", {"name": "Author", "review_policy": policy})
    step = {"name": "write", "step_type": "agent", "config": {"instructions": "Write."}}
    flow = {"name": "Write", "steps": [step], "config": {"review_policy": policy}}
    workflow = await market.ok("POST", "/workflows", flow)
    meta = {"slug": "writers", "name": "Writers", "version": "1.0.0"}
    body = {"agent_ids": [author["id"], reviewer["id"]], "workflow_ids": [workflow["id"]], "meta": meta}
    exported = await market.ok("POST", "/marketplace/export", body)
    specs = {each["key"]: each["spec"] for each in exported["resources"]}
    assert exported["requires"]["plugins"] == ["agents", "code_reviews", "workflows"]
    named = {"mode": "agent", "reviewer_agent_id": {"$ref": "reviewer"}}
    assert (specs["author"]["review_policy"], specs["write"]["config"]["review_policy"]) == (named, named)
    assert "review_policy" not in specs["reviewer"]
    alone = await market.member.post("/marketplace/export", {**body, "agent_ids": [author["id"]]})
    assert alone.json()["errors"][0]["code"] == "unknown_reference", alone

    await market.ok("POST", "/marketplace/templates", exported, by=market.admin)
    installation = await market.install("writers")
    made = objects(installation)
    wanted = {"mode": "agent", "reviewer_agent_id": made["reviewer"]["id"]}
    assert (await market.ok("GET", f"/agents/{made['author']['id']}"))["review_policy"] == wanted
    assert (await market.ok("GET", f"/workflows/{made['write']['id']}"))["config"]["review_policy"] == wanted

    changed = {"review_policy": {"mode": "human"}}
    await market.ok("PATCH", f"/agents/{made['author']['id']}", changed)
    path = f"/marketplace/installations/{installation['id']}"
    shown = objects(await market.ok("GET", path))
    assert {key: each["edited"] for key, each in shown.items()} == {"author": True, "reviewer": False, "write": False}


@pytest.mark.parametrize("user", ["agent", "workflow"])
async def test_a_reviewer_that_something_refers_to_is_kept(market: Market, user: str) -> None:
    await market.upload()
    installation = await market.install()
    policy = {"mode": "agent", "reviewer_agent_id": objects(installation)["sorter"]["id"]}
    if user == "agent":
        await market.ok("POST", "/agents", {"name": "Author", "review_policy": policy})
    else:
        step = {"name": "x", "step_type": "transform", "config": {"value": 1}}
        body = {"name": "Other", "steps": [step], "config": {"review_policy": policy}}
        await market.ok("POST", "/workflows", body)
    result = await market.ok("POST", f"/marketplace/installations/{installation['id']}/uninstall", {})
    assert [(each["key"], each["reason"]) for each in result["kept"]] == [("sorter", "in_use")]
