"""S3 over every way by which a webhook connects: create, update, test and attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.webhooks.conftest import PLUGINS, Hooks
from tests.promises.test_s03_egress import NAMES, canary, connections, corpus

from corral.testing.stub_servers import FakeResolver, StubServer
from corral_plugins.webhooks.models import Webhook

__all__ = ["canary", "connections"]

pytestmark = pytest.mark.one_engine


async def test_s3_hostile_urls_of_webhooks(
    make_kit: Callable[..., Any], canary: StubServer, connections: list[Any]
) -> None:
    hooks = await Hooks().build(await make_kit(plugins=PLUGINS))
    hooks.kit.kernel.egress.resolve = FakeResolver({**NAMES, "example.com": [["93.184.216.34"]]})
    await hooks.set("webhooks.max_per_user", 1000)
    urls = [url for url in corpus(canary.port) if len(url) <= 2048]
    assert len(urls) >= 200
    made = await hooks.create("https://example.com/hook", "things.*")
    path = f"/webhooks/{made['id']}"
    accepted = []
    for url in urls:
        created = await hooks.member.post("/webhooks", {"url": url, "events": ["things.*"]})
        changed = await hooks.member.put(path, {"url": url})
        for answer in (created, changed):
            if answer.status == 422:
                assert answer.code in ("url_blocked", "validation_error"), (url, answer)
            else:  # the name does not resolve at the moment
                assert answer.json()["warnings"] == ["unresolved_host"], (url, answer)
                accepted.append(url)
    errors = set()
    no_text_has_nul = hooks.kit.kernel.database.kind == "postgresql"
    for url in urls:  # as if it had been stored before the guard knew it
        if "\0" in url and no_text_has_nul:
            continue
        await hooks.kit.work(Webhook.update(url=url).where(Webhook.id == made["id"]).execute)
        errors.add((await hooks.ok(hooks.member.post(f"{path}/test")))["error"])
    assert errors <= {"blocked", "dns", "connect"}
    assert canary.connections == 0
    assert connections == []
    assert len(accepted) < len(urls) / 10


async def test_s3_names_that_lead_elsewhere_later(
    make_kit: Callable[..., Any], canary: StubServer, connections: list[Any]
) -> None:
    """The address is judged again at each attempt and each test."""
    hooks = await Hooks().build(await make_kit(plugins=PLUGINS))
    hooks.kit.kernel.egress.resolve = FakeResolver({"rebind.example": [["93.184.216.34"], ["127.0.0.1"]]})
    made = await hooks.create(f"http://rebind.example:{canary.port}/")
    assert made["warnings"] == []
    found = await hooks.ok(hooks.member.post(f"/webhooks/{made['id']}/test"))
    assert (found["delivered"], found["error"]) == (False, "blocked")
    await hooks.emit("one")
    await hooks.run()
    assert (await hooks.delivery(made["id"]))["attempts"][0]["error"] == "blocked"
    assert canary.connections == 0
    assert connections == []
