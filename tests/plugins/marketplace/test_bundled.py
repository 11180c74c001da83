"""The templates of this release: each is installed twice, runs to its end with scripted models, and is removed.

The worker's own program runs the tasks, in the process of the test, through the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.plugins.marketplace.conftest import Market, objects

from corral.testing.kit import Client, Kit
from corral_marketplace import catalogue
from corral_plugins.marketplace.service.manifests import template_id
from corral_plugins.workers.node.client import WorkerApiClient
from corral_plugins.workers.node.tool_run import ToolRun

Json = dict[str, Any]
SLUGS = sorted(json.loads(each)["slug"] for each in catalogue.manifests())
RECORD = {"number": "17", "date": "2026-01-31", "supplier": None, "total": 12.5, "currency": "EUR"}
FINDING = {"file": "x.py", "line": 1, "severity": "issue", "comment": "Why two?"}
ANSWERS: Json = {
    "Greet this person.": "Welcome, Ada! We are glad that you are here.",
    "Split the question into": {"parts": ["What is it?", "Why is it so?"]},
    "Find the answer to this part": {
        "answer": "It is so.",
        "sources": [{"title": "RFC", "url": "https://example.org"}],
    },
    "Write a draft of the report": {"draft": "A draft."},
    "List the faults of this draft": {"faults": ["The second claim has no source."]},
    "Write the report.": {"report": "# Report"},
    "Review this diff.": {"summary": "Fine.", "verdict": "approve", "findings": [FINDING]},
    "Classify this alert.": {
        "severity": "critical",
        "service": "shop",
        "summary": "The shop is down.",
        "suspected_cause": "The last deployment.",
        "is_actionable": True,
    },
    "Choose the runbook": {"title": "Service does not answer", "steps": ["Roll back."], "over_when": "It answers."},
    "Write the timeline": {"timeline": "10:00 The shop went down."},
    "Write the daily page": {"page": "Nothing needs a person."},
    "Classify this ticket.": {
        "category": "billing",
        "urgency": "normal",
        "language": "English",
        "summary": "A refund.",
    },
    "Draft the reply": {"reply": "You get your money back.", "needs_person": False},
    "Judge these log lines.": {"severity": "warning", "summary": "The disk fills up.", "evidence": ["disk 91 %"]},
    "Translate this paragraph.": {"text": "Hallo"},
    "Proof-read this translation": {"text": "Guten Tag"},
    "Extract the record": RECORD,
    "Some fields are empty.": {**RECORD, "supplier": "ACME"},
    "Group these commits": {"breaking": [], "features": ["Search"], "fixes": [], "left_out": ["Tests"]},
    "Write the release notes": {"notes": "## Features\nYou can search."},
    "Write the brief.": {"title": "A task failed", "brief": "Look at the task."},
    "Propose what to archive": {"archive": [{"id": "1", "reason": "old"}], "merge": []},
    "Explain the spending": {"summary": "Reviews cost most.", "advice": "Use a cheaper model."},
    "Write the minutes of this meeting": {
        "minutes": "We met.",
        "decisions": ["We ship."],
        "tasks": [{"title": "Ship it", "who": "Ada", "details": "On Monday."}],
    },
}
"""What the model says, by a phrase of the instructions."""
DIFF = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+two\n"
RUNS: dict[str, tuple[Json, Json]] = {
    "hello-fleet": ({"name": "Ada"}, {"text": ANSWERS["Greet this person."]}),
    "research-assistant": ({"question": "Why?"}, {"report": "# Report", "open_faults": 1, "failed_parts": 0}),
    "pr-reviewer": ({"diff": DIFF, "pull_request": {"title": "Fix"}}, {"decision": "approved", "note": ""}),
    "incident-triage": ({"alert": "down"}, {"severity": "critical", "decision": "approved"}),
    "daily-digest": ({}, {"page": "Nothing needs a person."}),
    "support-desk": (
        {"subject": "Refund", "body": "I want my money back."},
        {"category": "billing", "decision": "approved", "reply": "You get your money back."},
    ),
    "log-watcher": ({"log": "disk 91 %"}, {"severity": "warning", "summary": "The disk fills up."}),
    "translation-pipeline": (
        {"text": "Hello\n\nHello", "to": "German"},
        {"text": "Guten Tag\n\nGuten Tag", "failed": []},
    ),
    "data-extraction": ({"text": "Invoice 17"}, {"record": {**RECORD, "supplier": "ACME"}, "corrected": True}),
    "release-notes": (
        {"tag": "v1", "commits": [{"message": "Add search"}]},
        {"tag": "v1", "decision": "approved", "notes": "## Features\nYou can search."},
    ),
    "on-call-escalation": ({"event": "task.dead_lettered"}, {"escalated": False, "told_manager": False}),
    "knowledge-curator": (
        {"entries": [{"id": "1", "title": "Old", "content": "…", "updated_at": "2020-01-01"}]},
        {"decision": "approved"},
    ),
    "cost-watchdog": ({"percent": 80}, {"summary": "Reviews cost most.", "advice": "Use a cheaper model."}),
    "meeting-minutes": ({"transcript": "We ship."}, {"decisions": ["We ship."], "created": 1}),
}
"""The input of a run of each template, and what its output contains."""
NOTIFIED = [
    ("A task failed", "error"),
    ("Budget", "warning"),
    ("Daily digest", "info"),
    ("Log", "warning"),
]
"""The beginnings of the titles of what the runs tell their owner, and the severities."""


class Fleet(Market):
    """A marketplace with a worker, whose program the test runs."""

    worker: Client
    worker_id: str

    async def set_up(self) -> Fleet:
        """Approve a worker, and let all agents use the script."""
        made = await self.ok("POST", "/workers/register", {"name": "worker", "max_agents": 50}, by=self.admin)
        self.worker_id = made["id"]
        await self.ok("PATCH", f"/admin/workers/{made['id']}/approve", {"is_approved": True}, by=self.admin)
        self.worker = Client(self.kit.application.app, made["token"])
        await self.ok("POST", f"/workers/{made['id']}/heartbeat", {}, by=self.worker)
        await self.ok("PUT", "/settings/llm/default_model", {"value": "scripted/team"}, by=self.admin)
        return self

    async def run_workflow(self, workflow_id: str, input: Json, *, decision: str = "approve") -> Json:
        """Run a workflow to its end: work on its tasks, and decide what it asks."""
        run = await self.ok("POST", f"/workflows/{workflow_id}/run", {"input": input})
        for _ in range(60):
            await self.settle()
            found: Json = await self.ok("GET", f"/workflow-runs/{run['id']}")
            if found["status"] in ("completed", "failed", "cancelled"):
                return found
            claimed = await self.ok("POST", f"/workers/{self.worker_id}/claim", {}, by=self.worker)
            for claim in claimed["tasks"]:
                await self._attempt(claim)
            if not claimed["tasks"]:
                for approval in (await self.ok("GET", f"/approvals?run_id={run['id']}"))["items"]:
                    await self.ok("POST", f"/approvals/{approval['id']}/approve", {})
                for review in (await self.ok("GET", "/code-reviews?status=pending"))["items"]:
                    await self.ok("POST", f"/code-reviews/{review['id']}/{decision}", {})
        raise AssertionError(found)

    async def _attempt(self, claim: Json) -> None:
        await self.ok("POST", f"/tasks/{claim['task']['id']}/start", {"lease_id": claim["lease_id"]}, by=self.worker)
        from corral_plugins.workers.node.agent_loop import AgentLoop  # imports the SDK, for two seconds

        agent = Client(self.kit.application.app, claim["agent_token"])

        async def send(request: httpx2.Request) -> httpx2.Response:
            path = request.url.raw_path.decode()
            kept = {name: request.headers[name] for name in ("idempotency-key",) if name in request.headers}
            answer = await agent.request(request.method, path, content=request.content or None, headers=kept)
            return httpx2.Response(answer.status, headers=answer.headers, content=answer.body)

        client = WorkerApiClient("http://server.invalid", claim["agent_token"], transport=httpx2.MockTransport(send))
        is_tool = claim["agent"]["config"].get("executor") is not None
        attempt = (ToolRun if is_tool else AgentLoop)(client, claim, set())
        try:
            await attempt.run()
        finally:
            await client.close()


@pytest.fixture
async def fleet(make_kit: Callable[..., Any]) -> Fleet:
    """A fleet on each engine."""
    turns = [
        {"match": phrase, "text": answer if isinstance(answer, str) else json.dumps(answer)}
        for phrase, answer in ANSWERS.items()
    ]
    kit: Kit = await make_kit(config={"plugins.llm": {"scripts": {"team": {"turns": turns}}}})
    return await Fleet(kit, await kit.as_user("member"), await kit.as_user("admin")).set_up()


@pytest.mark.one_engine  # what templates do does not depend on the database; installing is tested on both engines
async def test_marketplace_1_every_template_installs_twice_and_runs_and_leaves_no_trace(fleet: Fleet) -> None:
    assert len(SLUGS) == 14
    assert sorted(RUNS) == SLUGS
    before, installed = await fleet.names(), {}
    listed = {each["slug"]: each for each in (await fleet.ok("GET", "/marketplace/templates?limit=200"))["items"]}
    assert sorted(listed) == SLUGS
    assert [each["problems"] for each in listed.values() if each["problems"]] == []
    assert {each["severity"] for template in listed.values() for each in template["findings"]} == set()
    for slug in SLUGS:
        plan = await fleet.install(slug, dry_run=True)
        first = await fleet.install(slug)
        assert [each["name"] for each in plan["objects"]] == [each["name"] for each in first["created"]]
        second = await fleet.install(template_id(slug))
        assert [each["name"].endswith(" (2)") for each in second["created"]] == [True] * len(second["created"])
        installed[slug] = (first, second)
    await fleet.settle()
    assert {each["status"] for each in (await fleet.ok("GET", "/agents?limit=200"))["items"]} == {"offline"}
    assert {each["status"] for each in (await fleet.ok("GET", "/workflows?limit=200"))["items"]} == {"draft"}
    assert {each["enabled"] for each in (await fleet.ok("GET", "/triggers?limit=200"))["items"]} == {False}
    assert (await fleet.ok("GET", "/tasks"))["total"] == 0
    assert (await fleet.ok("GET", "/workflow-runs"))["total"] == 0
    assert (await fleet.ok("GET", "/llm/calls"))["total"] == 0
    for slug, (first, _) in installed.items():
        await _runs(fleet, slug, first)
    sent = (await fleet.ok("GET", "/notifications?type=notification.sent&limit=200"))["items"]
    assert sorted((each["title"].partition(":")[0], each["severity"]) for each in sent) == NOTIFIED
    for first, second in installed.values():
        for made in (first, second):
            result = await fleet.ok("POST", f"/marketplace/installations/{made['id']}/uninstall", {})
            assert result["kept"] == [], made["slug"]
    assert await fleet.names() == before


async def _runs(fleet: Fleet, slug: str, made: Json) -> None:
    given, expected = RUNS[slug]
    agents = [each["id"] for each in made["created"] if each["kind"] == "agent"]
    for agent in agents:
        await fleet.ok("POST", f"/agents/{agent}/start", {})
    run = await fleet.run_workflow(objects(made)["main"]["id"], given)
    assert run["status"] == "completed", (
        slug,
        run["error"],
        [(s["name"], s["status"], s["error"]) for s in run["steps"]],
    )
    assert {name: run["output"].get(name) for name in expected} == expected, slug
    if slug == "pr-reviewer":
        run = await fleet.run_workflow(objects(made)["main"]["id"], given, decision="reject")
        assert (run["status"], run["output"]["decision"]) == ("completed", "rejected"), run["error"]
    for agent in agents:
        await fleet.ok("POST", f"/agents/{agent}/stop", {})
