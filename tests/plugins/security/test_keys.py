"""API keys: their form, their rights, their life."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from tests.plugins.security.conftest import AWAY, HOME, PLUGINS, From, make_key, within_two_seconds

from corral import clock
from corral.testing.kit import Client, Kit
from corral_plugins.security import jobs
from corral_plugins.security.service.api_keys import ALPHABET, LastUseRecorder, is_well_formed_key, new_key
from corral_plugins.security.settings import KEYS_PER_USER


def test_the_checksum_tells_every_single_slip() -> None:
    key = new_key()
    assert (len(key), key[:4], key[12], is_well_formed_key(key)) == (62, "crl_", "_", True)
    for place in range(len(key)):
        for letter in (ALPHABET[0], ALPHABET[-1], "_"):
            if letter != key[place]:
                assert not is_well_formed_key(key[:place] + letter + key[place + 1 :])
    assert not is_well_formed_key(key[:-1])
    assert not is_well_formed_key(key + "0")
    assert not is_well_formed_key(key[:4] + "é" + key[5:])
    assert set(key[13:]) <= set(string.ascii_letters + string.digits)


async def test_a_key_is_shown_once_and_read_by_its_owner_alone(kit: Kit) -> None:
    alice, bob, admin = [await kit.as_user(role) for role in ("member", "member", "admin")]
    _, shown = await make_key(alice, scopes=["tasks.*", "*.read"])
    assert shown["prefix"] == shown["key"][:12]
    path = f"/security/api-keys/{shown['id']}"
    read = (await alice.get(path)).json()
    assert "key" not in read
    assert (read["status"], read["owner"]["email"], read["scopes"]) == (
        "active",
        alice.user["email"],
        ["tasks.*", "*.read"],
    )
    assert (await bob.get(path)).status == (await admin.get(path)).status == 404
    assert (await bob.delete(path)).status == 404
    assert (await bob.get("/security/api-keys?all=true")).code == "forbidden"
    assert [item["id"] for item in (await admin.get("/security/api-keys?all=true")).json()["items"]] == [shown["id"]]
    assert (await admin.get("/security/api-keys")).json()["total"] == 0
    assert (await admin.delete(path)).status == 204
    assert (await admin.delete(path)).status == 404
    assert (await alice.get("/security/api-keys?status=revoked")).json()["total"] == 1
    assert (await alice.get("/security/api-keys?status=active&status=expired")).json()["total"] == 0


@pytest.mark.one_engine
async def test_scopes_narrow_what_the_owner_may_do(kit: Kit) -> None:
    alice = await kit.as_user("member")
    for scope in ("nothing.read", "admin.read", "tasks", "*.manage", "crl_"):
        refused = await alice.post("/security/api-keys", {"name": "x", "scopes": ["tasks.read", scope]})
        assert (refused.status, [item["pointer"] for item in refused.json()["errors"]]) == (422, ["/scopes/1"]), scope
    tasks, _ = await make_key(alice, scopes=["tasks.*"])
    assert (await tasks.get("/tasks")).status == 200
    assert (await tasks.get("/agents")).code == "insufficient_scope"
    assert (await tasks.get("/security")).code == "forbidden"  # its owner may not either
    assert (await tasks.get("/auth/me")).status == 200
    everything, _ = await make_key(alice, scopes=["*"])
    assert (await everything.post("/agents", {"name": "made by a key"})).status == 201
    named = {item["scope"]: item["roles"] for item in (await alice.get("/security/scopes")).json()["items"]}
    assert named["tasks.read"] == ["admin", "member", "viewer"]
    assert named["security.write"] == ["admin"]
    assert "workers.register_self" not in named


@pytest.mark.one_engine
async def test_what_a_key_can_never_do(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    key, shown = await make_key(admin, scopes=["*"])
    mine = f"/security/api-keys/{shown['id']}"
    user = f"/admin/users/{admin.user['id']}"
    for method, path, body in (
        ("POST", "/security/api-keys", {"name": "x"}),
        ("DELETE", mine, None),
        ("POST", f"{mine}/rotate", {}),
        ("PUT", "/security", {}),
        ("PUT", "/security/password-policy", {}),
        ("PUT", "/security/ip-rules", {"mode": "off", "rules": []}),
        ("DELETE", f"/security/sessions/{shown['id']}", None),
        ("POST", f"/security/users/{admin.user['id']}/revoke-sessions", {}),
        ("POST", "/auth/change-password", {"current_password": "x", "new_password": "y"}),
        ("PUT", "/auth/me", {"full_name": "x"}),
        ("POST", "/auth/logout", None),
        ("POST", "/auth/logout-all", {}),
        ("POST", "/auth/mfa/setup", {}),
        ("POST", "/auth/mfa/disable", {}),
        ("POST", "/auth/reauth", {}),
        ("POST", "/admin/users", {}),
        ("PATCH", user, {"role": "member"}),
        ("POST", "/plugins/realtime/disable", {}),
        ("POST", "/plugins/realtime/enable", {}),
    ):
        answer = await key.request(method, path, body)
        assert (answer.status, answer.code) == (403, "insufficient_scope"), (method, path, answer)


@pytest.mark.one_engine
async def test_a_credential_that_is_no_key_is_401_whatever_is_wrong_with_it(kit: Kit) -> None:
    alice = await kit.as_user("member")
    key, shown = await make_key(alice)
    text = shown["key"]
    for wrong in (text[:-1] + ("0" if text[-1] != "0" else "1"), new_key(), "crl_", text.upper()):
        answer = await From(alice, key=wrong).get("/tasks")
        assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
    bearer = await kit.client.get("/tasks", headers={"authorization": f"Bearer {text}"})
    assert bearer.status == 200
    both = await alice.get("/tasks", headers={"x-api-key": text})
    assert both.code == "malformed_request"
    assert (await key.get("/tasks")).status == 200


@pytest.mark.one_engine
async def test_rotation_keeps_the_key_and_the_old_text_for_the_overlap(kit: Kit) -> None:
    alice = await kit.as_user("member")
    old, shown = await make_key(alice)
    path = f"/security/api-keys/{shown['id']}"
    rotated = (await alice.post(f"{path}/rotate", {"overlap_seconds": 60})).json()
    assert (rotated["id"], rotated["prefix"], rotated["scopes"]) == (shown["id"], shown["prefix"], shown["scopes"])
    new = From(alice, key=rotated["key"])
    assert (await old.get("/tasks")).status == (await new.get("/tasks")).status == 200
    clock.travel(61)
    assert (await old.get("/tasks")).status == 401
    assert (await new.get("/tasks")).status == 200
    again = (await alice.post(f"{path}/rotate")).json()
    assert (await new.get("/tasks")).status == 401  # at once
    assert (await From(alice, key=again["key"]).get("/tasks")).status == 200
    await alice.delete(path)
    assert (await alice.post(f"{path}/rotate")).json()["current_status"] == "revoked"


async def test_of_rotations_at_once_one_wins(kit: Kit) -> None:
    alice = await kit.as_user("member")
    _, shown = await make_key(alice)
    answers = await asyncio.gather(*[alice.post(f"/security/api-keys/{shown['id']}/rotate") for _ in range(8)])
    texts = [answer.json()["key"] for answer in answers if answer.status == 200]
    assert {answer.status for answer in answers} <= {200, 409}
    alive = [text for text in texts if (await From(alice, key=text).get("/tasks")).status == 200]
    assert len(alive) == 1


@pytest.mark.one_engine
async def test_a_key_says_what_it_may_do_and_no_more(kit: Kit) -> None:
    admin, other = await kit.as_user("admin"), await kit.as_user("admin")
    key, _ = await make_key(other, scopes=["security.read"])
    assert (await key.get("/auth/me")).json()["permissions"] == ["security.read"]
    assert (await admin.patch(f"/admin/users/{other.user['id']}", {"role": "member"})).status == 200
    assert (await key.get("/auth/me")).json()["permissions"] == []


@pytest.mark.one_engine
async def test_every_key_ends(kit: Kit) -> None:
    alice = await kit.as_user("member")
    _, shown = await make_key(alice)
    days = (datetime.fromisoformat(shown["expires_at"]) - datetime.now(UTC)) / timedelta(days=1)
    assert 89.9 < days <= 90
    for late, code in ((400, "too_large"), (-1, "in_the_past")):
        asked = (datetime.now(UTC) + timedelta(days=late)).isoformat()
        refused = await alice.post("/security/api-keys", {"name": "x", "expires_at": asked})
        assert (refused.status, refused.json()["errors"][0]["code"]) == (422, code)
    soon, _ = await make_key(alice, expires_at=(datetime.now(UTC) + timedelta(minutes=5)).isoformat())
    assert (await soon.get("/tasks")).status == 200
    clock.travel(301)
    assert (await soon.get("/tasks")).code == "token_expired"


@pytest.mark.one_engine
async def test_a_user_has_so_many_keys_and_no_more(kit: Kit) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    assert (await admin.put("/security", {"api_keys_per_user": 3})).status == 200
    while kit.kernel.settings.get(KEYS_PER_USER) != 3:  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.02)
    answers = await asyncio.gather(*[alice.post("/security/api-keys", {"name": f"{n}"}) for n in range(8)])
    assert sorted(answer.status for answer in answers) == [201] * 3 + [429] * 5
    assert {answer.code for answer in answers if answer.status == 429} == {"quota_exceeded"}
    assert "retry-after" not in next(answer for answer in answers if answer.status == 429).headers


@pytest.mark.one_engine
async def test_a_key_counts_only_from_its_networks(kit: Kit) -> None:
    alice = await kit.as_user("member")
    bad = await alice.post("/security/api-keys", {"name": "x", "allowed_cidrs": ["10.0.0.0/8", "10.0.0.1/8", "xy"]})
    assert [(item["pointer"], item["detail"]) for item in bad.json()["errors"]] == [
        ("/allowed_cidrs/1", "10.0.0.1/8 is neither a network nor an address: write 10.0.0.0/8 or 10.0.0.1."),
        ("/allowed_cidrs/2", "xy is not an IP address or network, such as 203.0.113.7 or 10.0.0.0/8."),
    ]
    _, shown = await make_key(alice, allowed_cidrs=["198.51.100.0/24", "::ffff:192.0.2.0/120", "2001:db8::/32"])
    assert shown["allowed_cidrs"] == ["198.51.100.0/24", "192.0.2.0/24", "2001:db8::/32"]
    for address, status in (
        (HOME, 200),
        ("192.0.2.4", 200),
        ("::ffff:192.0.2.4", 200),
        ("2001:db8::9", 200),
        (AWAY, 403),
    ):
        answer = await From(alice, address, key=shown["key"]).get("/tasks")
        assert answer.status == status, address
    assert answer.code == "ip_blocked"


async def test_use_is_noted_without_a_write_for_each_request(kit: Kit) -> None:
    alice = await kit.as_user("member")
    _, shown = await make_key(alice)
    uses = kit.kernel.container.get(LastUseRecorder)
    caller = From(alice, HOME, key=shown["key"])
    for _ in range(5):
        await caller.get("/tasks")
    await uses.write_pending()
    path = f"/security/api-keys/{shown['id']}"
    first = (await alice.get(path)).json()
    assert first["last_used_ip"] == HOME
    await From(alice, AWAY, key=shown["key"]).get("/tasks")
    await uses.write_pending()
    assert (await alice.get(path)).json()["last_used_ip"] == HOME  # it is not a minute ago
    clock.travel(61)
    await From(alice, AWAY, key=shown["key"]).get("/tasks")
    await uses.write_pending()
    assert (await alice.get(path)).json()["last_used_ip"] == AWAY


@pytest.mark.one_engine
async def test_keys_go_with_the_password_unless_told_otherwise(make_kit: Callable[..., Any]) -> None:
    here, there = [await make_kit(plugins=PLUGINS) for _ in range(2)]  # neither does jobs
    alice, auditor = await here.as_user("member"), await here.as_user("auditor")
    words = {"current_password": "correct horse battery staple", "new_password": "entirely different phrase"}
    key, shown = await make_key(alice)
    elsewhere = Client(there.application.app, shown["key"])
    kept = await alice.post("/auth/change-password", {**words, "revoke_api_keys": False})
    alice.token = kept.json()["access_token"]
    await asyncio.sleep(1.5)
    assert (await key.get("/tasks")).status == (await elsewhere.get("/tasks")).status == 200
    words = {"current_password": words["new_password"], "new_password": "another phrase of old"}
    changed = await alice.post("/auth/change-password", words)
    assert (await key.get("/tasks")).status == 401
    alice.token = changed.json()["access_token"]
    assert (await alice.get(f"/security/api-keys/{shown['id']}")).json()["status"] == "revoked"
    rows = (await auditor.get("/admin/audit?action=security.api_key.revoke")).json()["items"]
    assert [(row["actor"]["id"], row["object"]["id"]) for row in rows] == [(alice.user["id"], shown["id"])]
    await within_two_seconds(lambda: elsewhere.get("/tasks"), 401)


@pytest.mark.one_engine
async def test_owners_are_told_once_a_week_and_a_day_before_the_end(kit: Kit) -> None:
    alice = await kit.as_user("member")
    end = (datetime.now(UTC) + timedelta(days=10)).isoformat()
    _, shown = await make_key(alice, expires_at=end)
    told: list[int] = []
    for days in (2, 2, 1, 3.5, 0.2, 0.2):  # 8, 6, 5, 1.5, 1.3, 1.1 days before the end
        clock.travel(days * 86_400)
        for notice in jobs.NOTICE_DAYS:
            await kit.kernel.database.work(partial(jobs.remind_of_expiring_keys, notice))
        told.append(len([event for event in await kit.events() if event.type == "api_key.expiring"]))
    assert told == [0, 1, 1, 1, 1, 1]
    clock.travel(0.5 * 86_400)
    for notice in jobs.NOTICE_DAYS * 2:
        await kit.kernel.database.work(partial(jobs.remind_of_expiring_keys, notice))
    events = [event for event in await kit.events() if event.type == "api_key.expiring"]
    assert [(event.payload()["key_id"], event.owner_id) for event in events] == [(shown["id"], alice.user["id"])] * 2


@pytest.mark.one_engine
async def test_switching_keys_off_ends_those_in_being(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    key, _ = await make_key(admin)
    assert (await admin.put("/security", {"api_keys_enabled": False})).status == 200
    await within_two_seconds(lambda: key.get("/tasks"), 401)
    assert (await admin.post("/security/api-keys", {"name": "x"})).code == "forbidden"


@pytest.mark.one_engine
@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "x", "scopes": []}, {"name": "x", "key": "mine"}])
async def test_bodies_that_are_none(kit: Kit, body: dict[str, Any]) -> None:
    alice = await kit.as_user("member")
    assert (await alice.post("/security/api-keys", body)).status == 422
