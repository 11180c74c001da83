"""Deliveries for webhook triggers: signatures, addresses, secrets that were replaced, and bodies."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import stop_refilling
from tests.plugins.triggers.conftest import PLUGINS, Alarm

from corral import clock
from corral.testing.kit import Answer

BODY = b'{"n":1}'


def path_of(made: Any) -> str:
    return str(made["ingress_url"].partition("/api/v1")[2])


async def deliver(alarm: Alarm, made: Any, body: bytes = BODY, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await alarm.kit.client.post(path_of(made), content=body, headers=named)


def hex_mac(secret: str, body: bytes = BODY) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


async def test_an_address_suffices_for_a_token_and_is_never_shown_again(alarm: Alarm) -> None:
    made = await alarm.create("webhook")
    assert made["secret"] is None
    assert (await deliver(alarm, made)).status == 202
    token = path_of(made).rpartition("/")[2]
    assert token not in json.dumps(await alarm.get(made["id"]))
    unknown = await alarm.kit.client.post("/hooks/crh_" + "x" * 43, content=BODY)
    await alarm.member.post(f"/triggers/{made['id']}/toggle", {"enabled": False})
    off = await deliver(alarm, made)
    await alarm.member.delete(f"/triggers/{made['id']}")
    gone = await deliver(alarm, made)
    assert unknown.status == off.status == gone.status == 404
    kept = [
        {k: v for k, v in each.json().items() if k not in ("request_id", "instance")} for each in (unknown, off, gone)
    ]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.one_engine
async def test_a_github_signature(alarm: Alarm) -> None:
    made = await alarm.create("webhook", {"auth": "github"}, filter="event.type == 'push'")
    signed: dict[str, Any] = {"X_Hub_Signature_256": f"sha256={hex_mac(made['secret'])}", "X_GitHub_Event": "push"}
    assert (await deliver(alarm, made, X_GitHub_Delivery="d1", **signed)).status == 202
    assert (await deliver(alarm, made, X_GitHub_Delivery="d1", **signed)).json()["duplicate"]
    assert (await deliver(alarm, made, X_Hub_Signature_256=hex_mac("wrong"))).status == 401
    await alarm.run()
    assert "fired" in await alarm.statuses(made["id"])


@pytest.mark.one_engine
async def test_a_standard_webhook(alarm: Alarm) -> None:
    made = await alarm.create("webhook", {"auth": "standard"})
    key = base64.b64decode(made["secret"].removeprefix("whsec_"))

    def headers(moment: float, identifier: str = "msg_1") -> dict[str, Any]:
        signed = f"{identifier}.{int(moment)}.".encode() + BODY
        mac = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
        return {
            "webhook_id": identifier,
            "webhook_timestamp": str(int(moment)),
            "webhook_signature": f"v1,{base64.b64encode(b'other').decode()} v1,{mac}",
        }

    now = clock.system_time_s()
    assert (await deliver(alarm, made, **headers(now))).status == 202
    assert (await deliver(alarm, made, **headers(now - 330, "msg_2"))).status == 401
    assert (await deliver(alarm, made, **headers(now + 330, "msg_3"))).status == 401
    assert (await deliver(alarm, made, **{**headers(now), "webhook_id": "msg_4"})).status == 401


@pytest.mark.one_engine
async def test_a_replaced_secret_is_valid_for_a_while(alarm: Alarm) -> None:
    made = await alarm.create("webhook", {"auth": "hmac_sha256", "signature_header": "X-Mine"})
    answer = await alarm.member.post(f"/triggers/{made['id']}/rotate-secret", {"overlap_seconds": 100})
    assert answer.status == 200, answer
    new = answer.json()["secret"]
    assert answer.json()["ingress_url"] is None
    assert new != made["secret"]
    for secret in (made["secret"], new):
        assert (await deliver(alarm, made, X_Mine=hex_mac(secret))).status == 202
    clock.travel(101)
    assert (await deliver(alarm, made, X_Mine=hex_mac(made["secret"]))).status == 401
    assert (await deliver(alarm, made, X_Mine=hex_mac(new))).status == 202


@pytest.mark.one_engine
async def test_a_trigger_whose_calls_must_now_be_signed_says_that_it_has_no_secret(alarm: Alarm) -> None:
    made = await alarm.create("webhook")
    path = f"/triggers/{made['id']}"
    changed = (await alarm.member.put(path, {"config": {"auth": "hmac_sha256"}})).json()
    rotate = f"{path}/rotate-secret"
    [warning] = changed["warnings"]
    assert f"`corral triggers rotate-secret {made['id']}`" in warning
    assert (await alarm.get(made["id"]))["warnings"] == changed["warnings"]
    assert (await deliver(alarm, made, X_Signature_256=hex_mac("any"))).status == 401
    new = (await alarm.member.post(rotate, {})).json()["secret"]
    assert (await alarm.get(made["id"]))["warnings"] == []
    assert (await deliver(alarm, made, X_Signature_256=hex_mac(new))).status == 202


@pytest.mark.one_engine
async def test_a_replaced_address_is_valid_for_a_while(alarm: Alarm) -> None:
    made = await alarm.create("webhook")
    new = (await alarm.member.post(f"/triggers/{made['id']}/rotate-secret", {"overlap_seconds": 100})).json()
    assert (await deliver(alarm, made)).status == (await deliver(alarm, new)).status == 202
    clock.travel(101)
    assert (await deliver(alarm, made)).status == 404
    assert (await deliver(alarm, new)).status == 202


@pytest.mark.one_engine
async def test_bodies(alarm: Alarm) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]}
    made = await alarm.create(
        "webhook", {"payload_schema": schema}, action={"type": "create_task", "title": "{{ payload.n }}"}
    )
    form = {"content_type": "application/x-www-form-urlencoded"}
    assert (await deliver(alarm, made, b"n=from+a+form", **form)).status == 202
    mismatch = await deliver(alarm, made, BODY)
    assert (mismatch.status, mismatch.code) == (422, "schema_mismatch")
    assert (await deliver(alarm, made, b"{")).status == 400
    assert (await deliver(alarm, made, b'{"n": 1, "n": 2}')).status == 400
    assert (await deliver(alarm, made, b"<n/>", content_type="application/xml")).status == 415
    assert (await deliver(alarm, made, b'"' + b"x" * 1024 * 1024 + b'"')).status == 413
    await alarm.run()
    assert [task["title"] for task in await alarm.tasks()] == ["from a form"]
    (row,) = await alarm.history(made["id"])
    assert row["input_preview"] == '{"n":"from a form"}'


@pytest.mark.one_engine
async def test_an_address_has_a_limit_of_its_own(make_kit: Callable[..., Any]) -> None:
    """The limit for clients without a credential, 120 a minute, does not apply to known addresses."""
    alarm = Alarm()
    await alarm.build(await make_kit(plugins=(*PLUGINS, "security"), config={"rate_limits": True}))
    stop_refilling(alarm.kit)
    made = await alarm.create("webhook")
    statuses = {(await deliver(alarm, made)).status for _ in range(130)}
    assert statuses == {202}
    unknown = [(await alarm.kit.client.post("/hooks/nothing", content=BODY)).status for _ in range(130)]
    assert set(unknown[:100]) == {404}
    assert unknown[-1] == 429
