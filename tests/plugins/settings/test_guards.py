"""What other plugins refuse, and who may change the sign-in policy by `/settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.settings import conftest as it

from corral.errors import Conflict
from corral.settings.store import SettingsStore


@pytest.mark.one_engine
async def test_a_guard_sees_the_result_and_refuses_it(shelf: it.Shelf) -> None:
    store: SettingsStore = shelf.kit.kernel.container.get(SettingsStore)
    seen = []

    def judge(result: Any, by: Any) -> None:
        seen.append((result.get(it.HIGH), by.user_id))
        if result.get(it.HIGH) == 99:
            raise Conflict("Not that.")

    store.add_check([it.HIGH], judge)
    assert (await shelf.put("shelf.width", 2)).status == 200
    assert (await shelf.put("shelf.high", 50)).status == 200
    refused = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.high": 99, "shelf.width": 3}})
    assert (refused.status, refused.code) == (409, "invalid_state")
    assert (shelf.get(it.HIGH), shelf.get(it.WIDTH)) == (50, 2.0)
    assert seen == [(50, shelf.admin.user["id"]), (99, shelf.admin.user["id"])]


@pytest.mark.one_engine
async def test_the_sign_in_policy_cannot_lock_out_its_author_by_this_way(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["settings", "security"])
    admin = await kit.as_user("admin")
    refused = await admin.put("/settings/security/require_mfa", {"value": True})
    assert (refused.status, refused.code) == (409, "would_lock_out")
    bulk = {"settings": {"security.require_mfa": True, "security.require_mfa_roles": ["member"]}}
    assert (await admin.put("/settings/bulk", bulk)).status == 200
    assert (await admin.put("/settings/security/require_mfa_roles", {"value": ["admin"]})).code == "would_lock_out"


@pytest.mark.one_engine
async def test_a_key_may_not_change_what_can_weaken_a_guard(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit()
    admin = await kit.as_user("admin")
    made = await admin.post("/security/api-keys", {"name": "script", "scopes": ["settings.read", "settings.write"]})
    key = type(admin)(admin.app, made.json()["key"])
    assert (await key.put("/settings/general/site_name", {"value": "By key"})).status == 200
    guards = {
        "security.max_sessions_per_user": 15,
        "password.min_length": 15,
        "mail.host": "mail.example.org",  # to which the links go that set passwords
        "tools.taint_enabled": False,
        "workers.auto_approve": True,
        "http.cors_origins": ["https://evil.example"],
        "http.anonymous_rate_per_minute": 100_000,
        "audit.retention_days": 365,
        "plugins.quarantine_errors": 100,
    }
    schema = (await key.get("/settings/schema")).json()["categories"]
    declared = {
        f"{each['category']}.{each['key']}": each["own_session"] for group in schema for each in group["settings"]
    }
    for name, value in guards.items():
        for refused in (
            await key.put(f"/settings/{name.replace('.', '/')}", {"value": value}),
            await key.put("/settings/bulk", {"settings": {"general.site_name": "Half", name: value}}),
        ):
            assert (refused.status, refused.code) == (403, "insufficient_scope"), name
            assert name in refused.json()["detail"]
        assert declared[name], name
        assert (await admin.put(f"/settings/{name.replace('.', '/')}", {"value": value})).status == 200, name
        assert (await key.post(f"/settings/{name.replace('.', '/')}/reset")).code == "insufficient_scope", name
    assert not declared["general.site_name"]
    assert (await key.get("/settings")).json()["general"]["site_name"] == "By key"
