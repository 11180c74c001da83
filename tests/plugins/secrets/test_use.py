"""Values for those who send them: who may, where to, until when, and what the redactor knows meanwhile."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.secrets.conftest import PLUGINS, VALUE, Safe, spellings

from corral import clock
from corral.errors import Problem
from corral.redact.redactor import redacting_machine_text
from corral_plugins.secrets.api import AttachedObject
from corral_plugins.secrets.service import redactor_values

AGENT = "agent:01900000-0000-7000-8000-000000000001"
SHOP = AttachedObject(plugin="llm", kind="provider", id="acme")


async def refused(safe: Safe, **asked: Any) -> str:
    """The code of the refusal of a use."""
    with pytest.raises(Problem) as caught:
        await safe.work(lambda: safe.service.use_value(**asked), read=True)
    assert VALUE not in str(caught.value)
    return caught.value.code


@pytest.mark.one_engine
async def test_a_value_goes_to_listed_consumers_and_hosts_only(safe: Any) -> None:
    made = await safe.create(
        name="api", allowed_consumers=[AGENT, "tool:http.fetch"], allowed_hosts=["api.org", "*.x.org"]
    )

    async def used(consumer: Any, host: str | None) -> str:
        found: str = await safe.work(lambda: safe.service.use_value("API", consumer, host), read=True)
        return found

    consumer: Any
    host: str | None
    for consumer, host in ((AGENT, "api.org"), ("tool:http.fetch", "a.b.X.org."), (("tool:other", AGENT), "api.org")):
        assert await used(consumer, host) == VALUE
    for consumer, host in (
        ("agent:01900000-0000-7000-8000-000000000002", "api.org"),
        ("plugin:llm", "api.org"),
        (AGENT, "x.org"),
        (AGENT, "api.org.evil.net"),
        (AGENT, "evilx.org"),
        (AGENT, None),
    ):
        assert await refused(safe, name="api", consumer=consumer, host=host) == "forbidden"
    assert await refused(safe, name="absent", consumer=AGENT, host="api.org") == "not_found"
    await safe.measured('corral_secret_uses_total{consumer="agent",outcome="ok"} 1.0')
    await safe.measured('corral_secret_uses_total{consumer="agent",outcome="refused"}')
    await safe.measured('corral_secrets{status="active"} 1.0')
    await safe.until(lambda: _last_used(safe, made["id"]))
    assert (await safe.admin.get(f"/secrets/{made['id']}")).json()["version"] == 1


async def _last_used(safe: Safe, id: str) -> Any:
    return (await safe.admin.get(f"/secrets/{id}")).json()["last_used_at"]


@pytest.mark.one_engine
async def test_an_attached_object_counts_as_listed_until_it_is_detached(safe: Any) -> None:
    await safe.create(name="key")
    asked = {"name": "key", "consumer": SHOP.consumer_name, "host": "acme.org", "attached": SHOP}
    assert await refused(safe, **asked) == "forbidden"
    await safe.work(lambda: safe.service.attach("key", SHOP, title="Acme", pointer="/x", by=None))
    assert await safe.work(lambda: safe.service.use_value(**asked), read=True) == VALUE
    other = AttachedObject(plugin="llm", kind="provider", id="other")
    assert await refused(safe, **{**asked, "attached": other}) == "forbidden"
    await safe.work(lambda: safe.service.detach(SHOP))
    assert await refused(safe, **asked) == "forbidden"
    with pytest.raises(Problem) as caught:
        await safe.work(lambda: safe.service.attach("absent", SHOP, title="", pointer="/api_key_secret", by=None))
    assert (caught.value.code, caught.value.errors[0].pointer) == ("unknown_reference", "/api_key_secret")


@pytest.mark.one_engine
async def test_an_expired_secret_is_used_by_nobody(safe: Any) -> None:
    await safe.create(name="key", expires_at=clock.now(60))
    await safe.work(lambda: safe.service.attach("key", SHOP, title="Acme", pointer="/x", by=None))
    clock.travel(61)
    asked = {"name": "key", "consumer": SHOP.consumer_name, "host": None, "attached": SHOP}
    assert await refused(safe, **asked) == "secret_expired"


async def test_a_rotated_value_is_valid_for_corrals_own_checks_while_its_grace_lasts(safe: Any) -> None:
    made = await safe.create(name="hook")
    await safe.work(lambda: safe.service.attach("hook", SHOP, title="Acme", pointer="/x", by=None))
    await safe.admin.post(f"/secrets/{made['id']}/rotate", {"value": "the second value", "grace_seconds": 60})

    async def valid() -> list[str]:
        found: list[str] = await safe.work(lambda: safe.service.valid_values("hook", attached=SHOP), read=True)
        return found

    assert await valid() == ["the second value", VALUE]
    used = await safe.work(lambda: safe.service.use_value("hook", SHOP.consumer_name, None, attached=SHOP), read=True)
    assert used == "the second value"
    clock.travel(61)
    assert await valid() == ["the second value"]


@pytest.mark.one_engine
async def test_a_value_that_stays_here_needs_no_host(safe: Any) -> None:
    await safe.create(name="hook", allowed_hosts=["api.example.org"])
    await safe.work(lambda: safe.service.attach("hook", SHOP, title="Acme", pointer="/x", by=None))
    assert await refused(safe, name="hook", consumer=SHOP.consumer_name, host=None, attached=SHOP) == "forbidden"
    assert await safe.work(lambda: safe.service.valid_values("hook", attached=SHOP), read=True) == [VALUE]


async def test_the_redactor_knows_every_value_soon_and_in_every_process(make_kit: Callable[..., Any]) -> None:
    one = await Safe().build(await make_kit(plugins=PLUGINS))
    made = await one.create()
    two = await Safe().reopen(await make_kit(plugins=PLUGINS))
    newer = "Rotated-Value-1234567890"

    async def known(safe: Safe, value: str) -> bool:
        texts = [text.decode() for text in spellings(value).values()]
        return [safe.kit.kernel.redactor.redact(text) for text in texts] == ["[redacted]"] * len(texts)

    assert await known(two, VALUE)  # from its start
    for safe in (one, two):
        began = asyncio.get_running_loop().time()
        value = f"{newer}{id(safe)}"
        await one.admin.post(f"/secrets/{made['id']}/rotate", {"value": value})
        for each in (one, two):
            await each.until(functools.partial(known, each, value))
        assert asyncio.get_running_loop().time() - began < 8  # 2 s on a machine that has nothing else to do
    assert await known(one, VALUE)  # old versions too, until they are destroyed
    await one.admin.delete(f"/secrets/{made['id']}/versions/1")

    async def forgotten() -> bool:
        return not await known(two, VALUE)

    await two.until(forgotten)


async def test_a_process_that_uses_a_value_tells_its_redactor_without_waiting_for_the_event(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await Safe().build(await make_kit(plugins=PLUGINS))
    two = await Safe().reopen(await make_kit(plugins=PLUGINS))
    monkeypatch.setattr(redactor_values.RedactorValues, "changes", ())  # no event wakes a process
    await one.create(name="hook")
    await one.work(lambda: one.service.attach("hook", SHOP, title="Acme", pointer="/x", by=None))

    def use() -> str:
        found: str = two.service.use_value("hook", SHOP.consumer_name, "api.acme.org", attached=SHOP)
        return found

    assert await two.work(use, read=True) == VALUE

    async def known() -> bool:
        return VALUE not in two.kit.kernel.redactor.redact(VALUE)

    await two.until(known)
    assert one.kit.kernel.redactor.redact(VALUE) == VALUE


@pytest.mark.one_engine
async def test_a_value_in_a_machines_text_is_an_alarm_that_names_the_secret(safe: Any) -> None:
    made = await safe.create(name="Shop.Key")
    redactor = safe.kit.kernel.redactor

    async def known() -> bool:
        return VALUE not in redactor.redact(VALUE)

    await safe.until(known)
    for task in ("task-1", "task-1", "task-2"):
        with redacting_machine_text("task", task):
            assert redactor.redact(f"the key is {VALUE}!") == "the key is [redacted]!"
    redactor.redact(VALUE)  # Corral's own log, say

    async def alerts() -> list[Any]:
        found = [each for each in await safe.events("system.alert") if each["kind"] == "secret_detected"]
        return found if len(found) >= 2 else []

    found = await safe.until(alerts)
    assert [each["object"] for each in found] == [{"type": "task", "id": name} for name in ("task-1", "task-2")]
    assert all("Shop.Key" in each["title"] and each["severity"] == "critical" for each in found)
    assert made["name"] in found[0]["detail"]


async def test_one_alarm_an_hour_whatever_the_number_of_processes(make_kit: Callable[..., Any]) -> None:
    one = await Safe().build(await make_kit(plugins=PLUGINS))
    await one.create(name="Key")
    two = await Safe().reopen(await make_kit(plugins=PLUGINS))

    async def alerts() -> list[Any]:
        return [each for each in await one.events("system.alert") if each["kind"] == "secret_detected"]

    async def known() -> bool:
        return VALUE not in one.kit.kernel.redactor.redact(VALUE)

    await one.until(known)
    for safe in (one, two):
        with redacting_machine_text("task", "task-1"):
            safe.kit.kernel.redactor.redact(VALUE)
        await one.until(alerts)
    await asyncio.sleep(0.5)
    assert len(await alerts()) == 1
