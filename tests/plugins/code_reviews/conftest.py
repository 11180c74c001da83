"""A desk on which diffs arrive: the world of the tasks' tests, with the plugin `code_reviews`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import Lease, World

from corral.testing.kit import Answer, Client, Kit

PLUGINS = ("admin", "security", "agents", "workers", "tasks", "audit", "settings", "tools", "files", "code_reviews")
HUMAN = {"mode": "human"}


def patch_of(
    *lines: str, path: str = "x.py", old: tuple[str, ...] = ("one", "two", "three", "four"), at: int = 1
) -> str:
    """A diff that replaces `two` by these lines."""
    kept = [f" {old[0]}", f"-{old[1]}", *(f"+{line}" for line in lines), *(f" {line}" for line in old[2:])]
    size = len(old) - 1 + len(lines)
    head = f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -{at},{len(old)} +{at},{size} @@\n"
    return head + "".join(f"{line}\n" for line in kept)


class Desk(World):
    """`member` owns the agents and their tasks; `other` is another member."""

    other: Client

    async def diff(self, lease: Lease, patch: str | None = None, **fields: Any) -> Any:
        """End a run with a diff; the task."""
        artifact = {"name": "change", "type": "diff", "patch": patch or patch_of("TWO"), "repo": "r", **fields}
        return await lease.ok("complete", {"result": {"n": 1}, "artifacts": [artifact]})

    async def waiting(self, **fields: Any) -> tuple[str, str]:
        """A task that waits for the review of its diff; the ids of the task and of the review."""
        task_id = await self.task(**{"review_policy": HUMAN, **fields})
        task = await self.diff(await self.worker.run())
        assert (task["status"], task["id"]) == ("waiting", task_id)
        return task_id, task["review_id"]

    async def opened(self, by: Client | None = None, /, **fields: Any) -> Any:
        """A review that a person opened."""
        body = {"title": "A change", "agent_id": self.agent_id, "patch": patch_of("TWO"), **fields}
        answer = await (by or self.member).post("/code-reviews", body)
        assert answer.status == 201, answer
        return answer.json()

    async def review(self, review_id: str) -> Any:
        """The review now."""
        answer = await self.member.get(f"/code-reviews/{review_id}")
        assert answer.status == 200, answer
        return answer.json()

    async def act(self, review_id: str, action: str, body: Any = None, by: Client | None = None) -> Answer:
        """An action on a review, by default of the other member."""
        return await (by or self.other).post(f"/code-reviews/{review_id}/{action}", body or {})

    async def comment(self, review_id: str, body: str, by: Client | None = None, **fields: Any) -> Any:
        """A comment."""
        answer = await self.act(review_id, "comment", {"body": body, **fields}, by)
        assert answer.status == 201, answer
        return answer.json()


@pytest.fixture
async def desk(make_kit: Callable[..., Any]) -> Desk:
    """A desk on each engine."""
    return await desk_of(await make_kit(plugins=PLUGINS))


async def desk_of(kit: Kit) -> Desk:
    """The desk of a kernel."""
    made = Desk()
    await made.build(kit)
    assert made.kit.loaded("code_reviews").active, made.kit.loaded("code_reviews").reason
    made.other = await made.kit.as_user("member")
    return made
