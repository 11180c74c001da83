"""Stored payloads of calls: which are stored, who may read them, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral import clock
from corral_plugins.llm.jobs import delete_expired_payloads
from corral_plugins.llm.service.calls import PayloadStore


async def chat(client: Any) -> Any:
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "a question"}]}
    return await client.post("/llm/chat/completions", body)


@pytest.mark.parametrize(("which", "kept"), [("off", 0), ("errors", 1), ("all", 2)])
async def test_which_payloads_are_stored(
    make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any, which: str, kept: int
) -> None:
    config = {"plugins.llm": {"providers": providers}, "settings.llm.store_payloads": which}
    kit = await make_kit(plugins=["cost", "llm"], config=config)
    alice, eve, admin = await kit.as_user("member"), await kit.as_user("member"), await kit.as_user("admin")
    await chat(alice)
    upstream.otherwise = up.refuses(500)
    await chat(alice)
    calls = (await alice.get("/llm/calls")).json()["items"]
    found = [(await alice.get(f"/llm/calls/{call['id']}")).json()["payload"] for call in calls]
    assert len([each for each in found if each is not None]) == kept
    for payload in found:
        assert payload is None or payload["request"]["messages"][0]["content"] == "a question"
    assert (await eve.get(f"/llm/calls/{calls[0]['id']}")).status == 404
    assert (await admin.get(f"/llm/calls/{calls[0]['id']}")).status == 200
    payloads = kit.kernel.container.get(PayloadStore)
    clock.travel(8 * 86_400)
    await kit.kernel.database.work(lambda: delete_expired_payloads(payloads))
    admin = await kit.as_user("admin")
    assert [(await admin.get(f"/llm/calls/{call['id']}")).json()["payload"] for call in calls] == [None, None]
