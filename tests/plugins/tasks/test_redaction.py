"""What a worker reports is stored without credentials: known ones in any form, and what looks like one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from corral import clock
from corral.redact.encodings import encodings
from corral.redact.matcher import MARK, Hit

SECRET = 'k3y/"of+the<house>-77'
TOKEN = "crw_" + "aB3-_" * 8


@pytest.fixture
def printed(world: Any) -> str:
    """Text of an agent that prints a stored credential plainly, encoded and escaped, and a token that nobody stored."""
    assert world.kit.kernel.redactor.set_values("vault", {"house-key": SECRET}) == []
    encoded = base64.b64encode(f"key={SECRET}".encode()).decode()
    return f"plain {SECRET} encoded {encoded} escaped {json.dumps(SECRET)} token {TOKEN}"


async def stored(world: Any) -> str:
    """Every row of every table, as text."""
    models = [model for loaded in world.kit.kernel.active for model in loaded.contributions_to("corral_models")]

    def dump() -> str:
        return "\n".join(json.dumps(list(model.select().dicts()), default=str) for model in models)

    text: str = await world.kit.kernel.database.work(dump, read=True)
    return text


async def test_egress_6_nothing_that_an_agent_prints_is_stored(
    world: Any, printed: str, caplog: pytest.LogCaptureFixture
) -> None:
    hits: list[Any] = []
    world.kit.kernel.redactor.on_hit(hits.append)
    task_id = await world.task("keep it")
    lease = await world.worker.run()
    await lease.ok("progress", {"percent": 10, "message": printed[:500]})
    await lease.ok("logs", {"entries": [{"seq": 0, "ts": clock.now(), "message": printed}]})
    await lease.ok("checkpoint", {"step": 1, "state": {"said": [printed], SECRET: 1}})
    await lease.ok("complete", {"result": {"text": printed, SECRET: [printed]}})
    failed = await world.task("fail it")
    await (await world.worker.run()).ok("fail", {"error": {"type": "Boom", "message": printed}, "retryable": False})
    answers = [
        (await world.member.get(f"/tasks/{each}{part}")).body.decode()
        for each in (task_id, failed)
        for part in ("", "/logs", "/attempts", "/events")
    ]
    everything = "\n".join([*answers, await stored(world), caplog.text])
    assert [text for text in (*encodings(SECRET), TOKEN) if text in everything] == []
    result = (await world.read(task_id))["result"]
    assert result[MARK] == [result["text"]]
    assert result["text"].startswith(f"plain {MARK} encoded ")
    assert Hit("value", "vault", "house-key") in hits[0]


@pytest.mark.one_engine
async def test_what_people_write_keeps_what_only_looks_like_a_credential(world: Any, printed: str) -> None:
    task_id = await world.task()
    answer = await world.member.post(f"/tasks/{task_id}/comments", {"body": f"{SECRET} and {TOKEN}"})
    assert answer.status == 201, answer
    assert f"{MARK} and {TOKEN}" in answer.body.decode()


@pytest.mark.one_engine
async def test_a_large_result_is_redacted_without_stopping_others(world: Any, printed: str) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    await lease.ok("complete", {"result": {"lines": [f"{number} {SECRET}" for number in range(4000)]}})
    lines = (await world.read(task_id))["result"]["lines"]
    assert (lines[0], lines[3999]) == (f"0 {MARK}", f"3999 {MARK}")
