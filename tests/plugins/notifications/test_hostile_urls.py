"""S3 over every way by which a channel connects: create, update, test and send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.notifications.conftest import PLUGINS, Notified
from tests.promises.test_s03_egress import NAMES, canary, connections, corpus

from corral.testing.stub_servers import FakeResolver, StubServer
from corral_plugins.notifications.models import Channel

__all__ = ["canary", "connections"]

pytestmark = pytest.mark.one_engine


async def test_s3_hostile_urls_of_channels(
    make_kit: Callable[..., Any], canary: StubServer, connections: list[Any]
) -> None:
    world = await Notified().build(await make_kit(plugins=PLUGINS))
    world.kit.kernel.egress.resolve = FakeResolver({**NAMES, "example.com": [["93.184.216.34"]]})
    urls = [url for url in corpus(canary.port) if len(url) <= 2048]
    assert len(urls) >= 200
    made = await world.channel("webhook", {"url": "https://example.com/hook"})
    path = f"/notifications/channels/{made['id']}"
    accepted = 0
    for number, url in enumerate(urls):
        body = {"name": f"channel {number}", "type": "webhook", "config": {"url": url}}
        created = await world.admin.post("/notifications/channels", body)
        changed = await world.admin.put(path, {"config": {"url": url}})
        for answer in (created, changed):
            if answer.status == 422:
                assert answer.code in ("url_blocked", "validation_error"), (url, answer)
            else:  # the name does not resolve at the moment
                assert answer.json()["warnings"] == ["unresolved_host"], (url, answer)
                accepted += 1
        body = {"name": f"slack {number}", "type": "slack", "config": {"webhook_url": url}}
        assert (await world.admin.post("/notifications/channels", body)).status == 422, url
    errors = set()
    for url in urls:  # as if it had been stored before the guard knew it
        change = Channel.update(config={"url": url}).where(Channel.id == made["id"])
        await world.kit.work(change.execute)
        errors.add((await world.ok(world.admin.post(f"{path}/test")))["error"].partition(":")[0])
    assert errors <= {"blocked", "connect", "circuit_open"}
    assert canary.connections == 0
    assert connections == []
    assert accepted < len(urls) / 5


async def test_s3_names_that_lead_elsewhere_later(
    make_kit: Callable[..., Any], canary: StubServer, connections: list[Any]
) -> None:
    """The address is judged again at each test and each delivery."""
    world = await Notified().build(await make_kit(plugins=PLUGINS))
    world.kit.kernel.egress.resolve = FakeResolver({"rebind.example": [["93.184.216.34"], ["127.0.0.1"]]})
    made = await world.channel("webhook", {"url": f"http://rebind.example:{canary.port}/"})
    assert made["warnings"] == []
    tested = await world.ok(world.admin.post(f"/notifications/channels/{made['id']}/test"))
    assert (tested["delivered"], tested["error"]) == (False, "blocked")
    await world.rule(made)
    await world.fail_task("one")
    await world.run()
    [row] = await world.deliveries()
    assert (row["status"], row["last_error"]) == ("retrying", "blocked")
    assert canary.connections == 0
    assert connections == []
