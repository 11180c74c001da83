"""Master keys: what needs which, and the change of keys, beside reads and writes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from typing import Any

import peewee
from tests.plugins.secrets.conftest import PLUGINS, VALUE, Safe

from corral_plugins.secrets.models import SecretVersion
from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation
from corral_plugins.secrets.service.redactor_values import RedactorValues
from corral_plugins.secrets.service.sealed_column_values import replace_value, values_after
from corral_plugins.webhooks.service.redactor_values import WebhookRedactorValues


def key(label: str) -> str:
    """A master key of this label."""
    return f"{label}:{base64.b64encode(hashlib.sha256(label.encode()).digest()).decode()}"


async def world(make_kit: Callable[..., Any], *labels: str, again: bool = True, **more: Any) -> Safe:
    """The vault with these master keys, the first of them active."""
    options = {"plugins": PLUGINS, **more}
    kit = await make_kit(environ={"CORRAL_MASTER_KEY": ",".join(map(key, labels))}, **options)
    return await (Safe().reopen(kit) if again else Safe().build(kit))


async def rotated(safe: Safe) -> None:
    """Wait until every row is under the active key."""

    async def done() -> bool:
        await safe.kit.run_jobs()
        status = (await safe.admin.get("/secrets/key-status")).json()
        return status["remaining"] == 0 and not status["rotating"]

    await safe.until(done)


async def test_a_new_key_takes_over_every_row_of_the_product(make_kit: Callable[..., Any]) -> None:
    old = await world(make_kit, "v1", again=False)
    values = {(await old.create(f"value-{n}-{n * 7919}"))["id"]: f"value-{n}-{n * 7919}" for n in range(5)}
    await old.admin.post("/secrets", {"name": "keyed", "value": VALUE}, headers={"Idempotency-Key": "one"})
    assert (await old.admin.post("/secrets/rotate-master-key")).code == "invalid_state"  # no new key
    safe = await world(make_kit, "v2", "v1")
    before = (await safe.admin.get("/secrets/key-status")).json()
    assert [item["label"] for item in before["keys"]] == ["v2", "v1"]
    tables = {column.name for column in safe.kit.kernel.container.get(MasterKeyRotation)._columns.columns}
    assert {"accounts_signing_keys.sealed", "accounts_refresh_tokens.successor", "kernel_idempotency.body"} < tables
    assert before["remaining"] == before["keys"][1]["rows"] >= 6 + 2
    vault = (await safe.admin.get("/settings/health")).json()["checks"]["vault"]
    assert (vault["status"], "old master key" in vault["detail"]) == ("degraded", True), vault
    answer = await safe.admin.post("/secrets/rotate-master-key")
    assert (answer.status, answer.json()) == (202, {"remaining": before["remaining"]})
    assert (await safe.admin.post("/secrets/rotate-master-key")).code == "invalid_state"  # one runs
    await rotated(safe)
    alone = await world(make_kit, "v2")
    status = (await alone.admin.get("/secrets/key-status")).json()
    assert (status["sealed"], status["remaining"], len(status["keys"])) == (False, 0, 1)
    assert (await alone.admin.get("/settings/health")).json()["checks"]["vault"]["status"] == "ok"
    await alone.step_up()
    for id, value in values.items():
        assert await alone.value(id) == value
    replayed = await alone.admin.post("/secrets", {"name": "keyed", "value": VALUE}, headers={"Idempotency-Key": "one"})
    assert (replayed.status, replayed.headers.get("idempotency-replayed")) == (201, "true")


async def test_rows_whose_keys_are_not_listed_stay_and_are_counted(make_kit: Callable[..., Any]) -> None:
    await world(make_kit, "v1", again=False)
    kept = await world(make_kit, "v2", "v1")
    await kept.admin.post("/secrets/rotate-master-key")
    await rotated(kept)
    lost = await world(make_kit, "v1", "v2")
    stray = await lost.create("the one under the old key")
    safe = await world(make_kit, "v3", "v2")
    made = await safe.create(name="newest")
    total = (await safe.admin.get("/secrets/key-status")).json()
    assert [item["label"] for item in total["keys"]] == ["v3", "v2", None]
    await safe.admin.post("/secrets/rotate-master-key")

    async def ended() -> bool:
        await safe.kit.run_jobs()
        return not (await safe.admin.get("/secrets/key-status")).json()["rotating"]

    await safe.until(ended)
    status = (await safe.admin.get("/secrets/key-status")).json()
    assert [(item["label"], item["rows"] > 0) for item in status["keys"]] == [("v3", True), ("v2", False), (None, True)]
    assert status["remaining"] == status["keys"][2]["rows"]
    await safe.step_up()
    assert await safe.value(made["id"]) == VALUE
    assert (await safe.reveal(stray["id"])).code == "vault_sealed"
    health = next(loaded for loaded in safe.kit.kernel.plugins if loaded.name == "secrets").contributions_to(
        "corral_health_checks"
    )
    assert health[0].check()[0] == "degraded"


async def test_the_redactor_learns_what_another_process_made_readable(make_kit: Callable[..., Any]) -> None:
    plugins, early, in_hook = (*PLUGINS, "webhooks"), "stored under the old key", "signs-under-the-old-key-too"
    old = await world(make_kit, "v1", again=False, plugins=plugins)
    await old.create(early, name="early")
    hook = {"url": "https://example.org/", "events": ["*"], "secret": in_hook, "is_active": False}
    assert (await old.admin.post("/webhooks", hook)).status == 201
    both = await world(make_kit, "v2", "v1", plugins=plugins)
    await both.create("stored under the new key", name="late")
    alone = await make_kit(plugins=plugins, environ={"CORRAL_MASTER_KEY": key("v2")})  # the old key left too early
    redactor, said = alone.kernel.redactor, f"{early}, {in_hook}"
    assert redactor.redact(said) == said
    assert (await both.admin.post("/secrets/rotate-master-key")).status == 202
    await rotated(both)
    await alone.service(RedactorValues).refresh()
    await alone.service(WebhookRedactorValues).refresh()
    assert redactor.redact(said) == "[redacted], [redacted]"
    assert alone.service(RedactorValues).unreadable == 0


async def test_a_value_that_was_cut_stands_in_nobodys_way(make_kit: Callable[..., Any]) -> None:
    old = await world(make_kit, "v1", again=False)
    cut, whole = await old.create(), await old.create("another value altogether")
    first_part = peewee.fn.SUBSTR(SecretVersion.sealed, 1, 201)
    of_it = SecretVersion.secret_id == cut["id"]
    await old.work(lambda: SecretVersion.update(sealed=first_part).where(of_it).execute())
    safe = await world(make_kit, "v2", "v1")
    assert (await safe.admin.post("/secrets/rotate-master-key")).status == 202

    async def left() -> bool:
        await safe.kit.run_jobs()
        status = (await safe.admin.get("/secrets/key-status")).json()
        return status["remaining"] == 1 and not status["rotating"]

    await safe.until(left)
    await safe.step_up()
    assert await safe.value(whole["id"]) == "another value altogether"
    assert (await safe.reveal(cut["id"])).code == "secrets.damaged"
    keys = safe.kit.kernel.container.get(MasterKeyRotation)
    wrong = await safe.work(lambda: keys.count_unreadable_values(lambda fn: fn()), read=True)
    assert {name: count for name, count in wrong.items() if count} == {"secrets_versions.sealed": 1}


async def test_secrets_6_values_change_while_they_are_rewrapped(make_kit: Callable[..., Any]) -> None:
    """A write between the reading of a batch and its writing wins."""
    old = await world(make_kit, "v1", again=False)
    made = await old.create("the first value of it")
    safe = await world(make_kit, "v2", "v1")
    keys = safe.kit.kernel.container.get(MasterKeyRotation)
    column = next(each for each in keys._columns.columns if each.model is SecretVersion)
    before = await safe.work(lambda: values_after(column, None, 10), read=True)
    await asyncio.gather(*(safe.admin.put(f"/secrets/{made['id']}", {"value": f"value number {n}"}) for n in range(4)))
    assert await safe.work(lambda: replace_value(column, before[0], "01" + "00" * 100))
    assert not await safe.work(lambda: replace_value(column, before[0], "01" + "11" * 100))
    await safe.step_up()
    assert (await safe.value(made["id"])).startswith("value number")
