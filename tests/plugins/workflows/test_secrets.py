"""Secrets in HTTP steps: the receiver gets the value, and nothing that Corral stores or tells contains it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.plugins.tools.receiver import receiver
from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of

from corral.events.log import EventRow
from corral_plugins.workflows.api import StepFailure
from corral_plugins.workflows.models import Run, StepRun, WorkflowVersion
from corral_plugins.workflows.service.builtin_steps import HttpSteps

VALUE = "tok-5e6f7a8b9c0d-of-the-shop"


async def test_the_value_reaches_the_receiver_and_is_kept_nowhere(
    make_kit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    caplog.set_level("DEBUG", "corral")
    async with receiver() as shop:
        kit = await make_kit(plugins=(*PLUGINS, "secrets"), config={"egress.allow": [f"127.0.0.1:{shop.port}"]})
        world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
        headers = {"Authorization": "Bearer {{ secrets.SHOP }}"}
        body = {"key": "{{ secrets.SHOP }}", "n": "{{ input.n }}"}
        config = {"method": "POST", "url": shop.url("/echo"), "headers": headers, "body": body}
        workflow_id = await world.workflow(step("call", "http", config))
        secret = {"name": "SHOP", "value": VALUE, "allowed_hosts": ["127.0.0.1"]}
        allowed = {**secret, "allowed_consumers": [f"workflow:{workflow_id}"]}
        await world.ok("POST", "/secrets", allowed, by=world.admin)
        async with asyncio.timeout(60):
            while VALUE in kit.kernel.redactor.redact(VALUE, patterns=False):  # noqa: ASYNC110  (has no notification)
                await asyncio.sleep(0.02)
        shop.pages["/echo"] = (200, {"X-Echo": VALUE}, f"you sent {VALUE}".encode())
        run = await world.until(await world.start(workflow_id, {"n": 7}))
        assert run["status"] == "completed", run["error"]
        assert shop.headers[-1]["authorization"] == f"Bearer {VALUE}"
        assert shop.seen[-1][2] == b'{"key":"%s","n":7}' % VALUE.encode()
        assert steps_of(run)["call"]["input"]["body"] == {"key": "{{ secrets.SHOP }}", "n": 7}
        assert VALUE not in str(run)
        tables: Any = (Run, StepRun, WorkflowVersion, EventRow)
        kept = await kit.work(lambda: [list(table.select().dicts()) for table in tables], read=True)
        assert all(kept)
        assert VALUE not in str(kept)
        assert VALUE not in caplog.text
        elsewhere = {"allowed_consumers": ["workflow:another"]}
        (made,) = (await world.ok("GET", "/secrets", by=world.admin))["items"]
        await world.ok("PUT", f"/secrets/{made['id']}", elsewhere, by=world.admin)
        refused = await world.until(await world.start(workflow_id, {"n": 7}))
        assert (refused["status"], refused["error"]["type"]) == ("failed", "forbidden")
        assert len(shop.seen) == 1


async def test_secrets_are_not_sent_to_another_host_than_that_for_which_they_were_released() -> None:
    given = {"method": "GET", "url": "http://one.example/"}

    async def with_secrets(host: str) -> dict[str, str]:
        assert host == "one.example"
        return {**given, "url": "http://two.example/"}  # an expression with now() may give another host this time

    context: Any = SimpleNamespace(config=given, with_secrets=with_secrets, idempotency_key="key")
    with pytest.raises(StepFailure, match="depend neither on a secret nor on the time"):
        await HttpSteps().execute(context)
