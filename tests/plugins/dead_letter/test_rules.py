"""The rules of dead letters beside the numbered promises: reasons, overrides, completeness, retention and alerts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from playhouse.schema_diff import diff_models
from tests.plugins.dead_letter.conftest import PLUGINS, Morgue

from corral import clock
from corral.ids import new_id


async def test_models_and_migration_agree(morgue: Morgue) -> None:
    models = morgue.kit.loaded("dead_letter").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(morgue.kit.kernel.database.engine, models))

    assert await morgue.kit.work(differences) == ""


@pytest.mark.one_engine
async def test_the_reason_tells_why_corral_gave_up(morgue: Morgue) -> None:
    refused = await morgue.dead("refused")
    listed = await morgue.task("listed", retry_policy={"non_retryable_types": ["Fatal"]})
    await (await morgue.worker.run()).ok("fail", {"error": {"type": "Fatal", "message": "x"}})
    used_up = await morgue.task("used up", retry_policy={"max_attempts": 1})
    await (await morgue.worker.run()).ok("fail", {"error": {"type": "Boom", "message": "x"}})
    never = await morgue.task("never claimed", queue_timeout_seconds=10)
    late = await morgue.task("late", deadline=clock.now(5))
    await morgue.later(20)
    reasons = {each["task_id"]: each["reason"] for each in await morgue.letters()}
    assert reasons == {
        refused: "non_retryable",
        listed: "non_retryable",
        used_up: "max_attempts",
        never: "expired",
        late: "expired",
    }
    stats = (await morgue.admin.get("/dead-letter/stats")).json()
    assert (stats["total"], stats["by_reason"]["expired"], stats["by_reason"]["budget"]) == (5, 2, 0)
    assert stats["by_error_type"]["Boom"] == 2
    assert stats["by_agent"] == {morgue.agent_id: 3, "none": 2}
    assert (stats["added_1h"], stats["added_24h"], stats["retry_success_rate"]) == (5, 5, None)


@pytest.mark.one_engine
async def test_a_failed_dependency_makes_no_letter(morgue: Morgue) -> None:
    needed = await morgue.task("needed")
    dependent = await morgue.task("dependent", depends_on=[needed])
    await morgue.dead_by_owner(needed)
    assert [each["task_id"] for each in await morgue.letters()] == [needed]
    letter = await morgue.letter(needed)
    assert (await morgue.admin.post(f"/dead-letter/{letter['id']}/retry", {})).status == 200
    assert (await morgue.read(dependent))["status"] == "blocked"


@pytest.mark.one_engine
async def test_a_task_that_fails_again_gets_a_new_letter(morgue: Morgue) -> None:
    task_id = await morgue.dead()
    first = await morgue.letter(task_id)
    assert (await morgue.admin.post(f"/dead-letter/{first['id']}/retry", {})).status == 200
    assert (await morgue.read(task_id))["dead_letter_id"] is None
    await (await morgue.worker.run()).ok("fail", {"error": {"type": "Again", "message": "x"}, "retryable": False})
    second = await morgue.letter(task_id)
    assert (second["retry_count"], second["error_type"], len(second["attempts"])) == (1, "Again", 1)
    assert len((await morgue.admin.get(f"/dead-letter/{first['id']}")).json()["attempts"]) == 1
    assert (await morgue.admin.get("/dead-letter/stats")).json()["retry_success_rate"] == 0.0


async def test_overrides_change_the_task_and_the_snapshot_stays(morgue: Morgue) -> None:
    task_id = await morgue.dead(instructions="Try it.", input={"a": 1})
    letter = await morgue.letter(task_id)
    path = f"/dead-letter/{letter['id']}/retry"
    unknown = await morgue.admin.post(path, {"overrides": {"agent_id": new_id()}})
    assert unknown.code == "unknown_reference"
    assert (await morgue.letter(task_id))["status"] == "open"
    other = await morgue.agent("other")
    overrides = {"agent_id": other, "instructions": "Try harder.", "input": {"a": 2}, "priority": "high"}
    retried = await morgue.admin.post(path, {"overrides": {**overrides, "timeout_seconds": 60}})
    task = retried.json()["task"]
    assert {name: task[name] for name in overrides} == overrides
    assert task["timeout_seconds"] == 60
    assert retried.json()["task_snapshot"]["instructions"] == "Try it."
    assert retried.json()["task_snapshot"]["input"] == {"a": 1}
    lease = await morgue.worker.run()
    assert lease.claim["agent"]["id"] == other


async def test_a_retry_by_the_owner_closes_the_letter_and_a_deletion_discards_it(morgue: Morgue) -> None:
    retried, deleted = await morgue.dead("one"), await morgue.dead("two")
    assert (await morgue.member.post(f"/tasks/{retried}/retry", {})).status == 200
    assert (await morgue.member.delete(f"/tasks/{deleted}")).status == 204
    states = {each["task_id"]: each["status"] for each in await morgue.letters("?status=all")}
    assert states == {retried: "retried", deleted: "discarded"}
    (gone,) = await morgue.letters("?status=discarded")
    assert (await morgue.admin.get(f"/dead-letter/{gone['id']}")).json()["task_snapshot"]["title"] == "two"


async def test_the_list_filters_and_discard_all_takes_what_the_filter_selects(morgue: Morgue) -> None:
    boom, other = await morgue.dead("A broken thing"), await morgue.dead("Another", type="Other")
    for query, wanted in (
        ("?error_type=Other", [other]),
        ("?search=broken", [boom]),
        ("?reason=expired", []),
        (f"?agent_id={morgue.agent_id}", [other, boom]),
        ("?status=retried", []),
        ("?status=all", [other, boom]),
    ):
        assert [each["task_id"] for each in await morgue.letters(query)] == wanted, query
    assert (await morgue.admin.post("/dead-letter/discard-all", {})).status == 422
    answer = await morgue.admin.post("/dead-letter/discard-all", {"filter": {"error_type": "Other"}})
    assert answer.json() == {"discarded": 1}
    assert [each["task_id"] for each in await morgue.letters()] == [boom]


@pytest.mark.one_engine
async def test_letters_of_the_time_without_the_plugin_are_made_up_for(make_kit: Callable[..., Any]) -> None:
    """A task also fails without the plugin; its letter appears when the plugin is enabled again."""
    before = Morgue()
    kit = await make_kit(plugins=PLUGINS[:-1])
    await before.build(kit)
    task_id = await before.task("doomed", retry_policy={"max_attempts": 1})
    await (await before.worker.run()).ok("fail", {"error": {"type": "Boom", "message": "It broke."}})
    assert (await before.read(task_id))["dead_letter_id"] is None
    await before.member.post(f"/tasks/{await before.task('cancelled')}/cancel", {})
    await kit.kernel.stop()
    after = Morgue()
    after.kit = await make_kit(plugins=PLUGINS)
    after.admin = await after.kit.as_user("admin", "second@example.org")
    after.member = after.admin
    assert await after.letters() == []
    for _ in range(2):
        await after.kit.run_schedule("dead_letter.check")
        letter = await after.letter(task_id)
        assert (letter["reason"], letter["error_type"], len(letter["attempts"])) == ("max_attempts", "Boom", 1)
    assert (await after.read(task_id))["dead_letter_id"] == letter["id"]


async def test_old_and_surplus_letters_are_deleted_closed_ones_first(
    make_kit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    morgue = Morgue()
    await morgue.build(await make_kit(plugins=(*PLUGINS, "settings")))
    caplog.set_level(logging.INFO)
    old = await morgue.dead("old")
    await morgue.later(181 * 86_400)
    tasks = [await morgue.dead_by_owner(await morgue.task(f"new {n}")) for n in range(103)]
    newest = await morgue.letter(tasks[-1])
    assert (await morgue.admin.delete(f"/dead-letter/{newest['id']}")).status == 204
    changed = await morgue.admin.put("/settings/dead_letter/max_rows", {"value": 100})
    assert changed.status == 200, changed
    await morgue.kit.run_schedule("dead_letter.prune")
    kept = [each["task_id"] for each in await morgue.letters("?status=all&limit=200")]
    assert old not in kept
    assert kept == list(reversed(tasks[2:-1]))
    purged = [vars(record) for record in caplog.records if record.getMessage() == "dead letters purged"]
    assert [(record["why"], record["count"]) for record in purged] == [("expired", 1), ("surplus", 3)]


async def test_growth_alerts_admins_once_an_hour(morgue: Morgue) -> None:
    for n in range(21):
        await morgue.dead_by_owner(await morgue.task(f"dead {n}"))
    for _ in range(2):
        await morgue.kit.run_schedule("dead_letter.check")
    alerts = [msgspec.json.decode(event.data) for event in await morgue.kit.events() if event.type == "system.alert"]
    (alert,) = [each for each in alerts if each["kind"] == "dead_letters"]
    assert (alert["count"], alert["top_reason"]) == (21, "non_retryable")
