"""A trigger on an approval does what Corral does not: it has the approved diff merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.plugins.code_reviews.conftest import PLUGINS, patch_of
from tests.plugins.triggers.conftest import Alarm


async def test_an_approval_fires_a_trigger_with_the_hash_of_what_was_approved(make_kit: Callable[..., Any]) -> None:
    alarm = Alarm()
    await alarm.build(await make_kit(plugins=(*PLUGINS, "triggers")))
    text = "Merge {{ payload.patch_sha256 }} of {{ payload.review_id }}"
    action = {"type": "create_task", "title": "Merge", "instructions": text}
    made = await alarm.create("event", {"event": "code_review.approved"}, action=action)
    body = {"title": "A change", "agent_id": alarm.agent_id, "patch": patch_of("TWO")}
    reviews = [(await alarm.member.post("/code-reviews", body)).json() for _ in range(2)]
    for review, verb in zip(reviews, ("reject", "approve"), strict=True):
        assert (await alarm.member.post(f"/code-reviews/{review['id']}/{verb}", {})).status == 200
    await alarm.run()
    assert await alarm.statuses(made["id"]) == ["fired"]
    (task,) = await alarm.tasks()
    assert task["source"] == {"type": "trigger", "id": made["id"]}
    full = await alarm.read(task["id"])
    assert full["instructions"] == f"Merge {reviews[1]['patch_sha256']} of {reviews[1]['id']}"
