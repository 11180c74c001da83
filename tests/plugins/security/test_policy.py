"""The sign-in policy, the password policy, and the sessions of everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from tests.plugins.security.conftest import AWAY, HOME, PLUGINS, TRUSTING, From, make_key, within_two_seconds

from corral.errors import Unavailable
from corral.http.routes import Route
from corral.plugin import Audit, AuditEntry, Plugin, Provide, hookimpl
from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.models import UserRow
from corral_plugins.security.shapes import PasswordPolicyPatch, PolicyPatch

pytestmark = pytest.mark.one_engine


async def test_the_configuration_is_the_settings_of_its_category(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    shown = (await admin.get("/security")).json()
    settings = (await admin.get("/settings")).json()
    extra = {"ip_mode", "warnings", "version"}
    assert {name: value for name, value in shown.items() if name not in extra} == settings["security"]
    passwords = (await admin.get("/security/password-policy")).json()
    assert {name: value for name, value in passwords.items() if name not in ("max_length", "version")} == settings[
        "password"
    ]
    assert passwords["max_length"] == 128
    changed = await admin.put("/security", {"step_up_seconds": 120})
    assert (changed.status, changed.json()["step_up_seconds"]) == (200, 120)
    assert changed.headers["etag"] != f'"{shown["version"]}"'
    assert (await admin.get("/settings?category=security")).json()["security"]["step_up_seconds"] == 120
    events = [event.payload() for event in await kit.events() if event.type == "security.changed"]
    assert events == [{"section": "security", "changed": ["step_up_seconds"]}]
    assert (await admin.put("/security", {})).json()["version"] == changed.json()["version"]


async def test_bounds_are_those_of_the_settings(kit: Kit) -> None:
    """Declared by the kernel and told twice: the schemas agree."""
    admin = await kit.as_user("admin")
    categories = (await admin.get("/settings/schema")).json()["categories"]
    declared = {
        f"{category['name']}.{item['key']}": item["schema"] for category in categories for item in category["settings"]
    }
    for section, patch in (("security", PolicyPatch), ("password", PasswordPolicyPatch)):
        ours = msgspec.json.schema(patch)["$defs"][patch.__name__]["properties"]
        for name, schema in ours.items():
            theirs = declared[f"{section}.{name}"]
            for bound in ("minimum", "maximum", "maxItems"):
                assert _found(schema, bound) == _found(theirs, bound) or bound == "maxItems", (name, bound)
            assert sorted(_found(schema, "enum") or []) == sorted(_found(theirs, "enum") or []), name


def _found(schema: Any, key: str) -> Any:
    if isinstance(schema, dict):
        if key in schema:
            return schema[key]
        for value in schema.values():
            if (found := _found(value, key)) is not None:
                return found
    if isinstance(schema, list):
        for value in schema:
            if (found := _found(value, key)) is not None:
                return found
    return None


async def test_a_stale_version_is_412(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    for path, body in (("/security", {"step_up_seconds": 200}), ("/security/password-policy", {"min_length": 14})):
        tag = (await admin.get(path)).headers["etag"]
        assert (await admin.put(path, body, headers={"if-match": tag})).status == 200
        stale = await admin.put(path, body, headers={"if-match": tag})
        assert (stale.status, stale.code) == (412, "precondition_failed")


async def test_what_the_environment_pins_is_locked(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, environ={"CORRAL_REGISTRATION": "invite"})
    admin = await kit.as_user("admin")
    locked = await admin.put("/security", {"registration": "open", "step_up_seconds": 200})
    assert (locked.status, locked.code) == (409, "setting_locked")
    assert "CORRAL_REGISTRATION" in locked.json()["detail"]
    assert (await admin.get("/security")).json()["step_up_seconds"] == 300


async def test_who_asks_for_a_second_factor_must_have_one(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    refused = await admin.put("/security", {"require_mfa": True, "step_up_seconds": 100})
    assert (refused.status, refused.code) == (409, "would_lock_out")
    assert (await admin.get("/security")).json()["step_up_seconds"] == 300
    others = await admin.put("/security", {"require_mfa": True, "require_mfa_roles": ["viewer"]})
    assert others.status == 200
    assert (await admin.put("/security", {"require_mfa_roles": ["viewer", "admin"]})).code == "would_lock_out"
    enrolled = UserRow.update(mfa_enabled=True).where(UserRow.id == admin.user["id"])
    await kit.kernel.database.work(enrolled.execute)
    assert (await admin.put("/security", {"require_mfa_roles": ["viewer", "admin"]})).status == 200


async def test_a_key_is_no_way_round_the_second_factor(kit: Kit) -> None:
    admin, viewer = await kit.as_user("admin"), await kit.as_user("viewer")
    key, _ = await make_key(viewer)
    assert (await key.get("/tasks")).status == 200
    await admin.put("/security", {"require_mfa": True, "require_mfa_roles": ["viewer"]})
    assert (await within_two_seconds(lambda: key.get("/tasks"), 403)).code == "mfa_required"
    enrolled = UserRow.update(mfa_enabled=True).where(UserRow.id == viewer.user["id"])
    await kit.kernel.database.work(enrolled.execute)
    await within_two_seconds(lambda: key.get("/tasks"), 200)


async def test_verified_addresses_need_mail(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    refused = await admin.put("/security", {"email_verification": True})
    assert [item["pointer"] for item in refused.json()["errors"]] == ["/email_verification"]
    assert (await admin.put("/settings/mail/host", {"value": "mail.example.org"})).status == 200
    async with asyncio.timeout(60):
        while (await admin.put("/security", {"email_verification": True})).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_warnings_tell_what_deserves_a_look(make_kit: Callable[..., Any]) -> None:
    open_to_all = {"server.bind": "0.0.0.0:8000", "rate_limits": True}
    kit: Kit = await make_kit(plugins=PLUGINS, config=open_to_all)
    admin = await kit.as_user("admin")
    assert "registration_open_on_public_bind" not in (await admin.get("/security")).json()["warnings"]
    await admin.put("/security", {"registration": "open"})
    found = (await admin.get("/security")).json()["warnings"]
    assert found == ["registration_open_on_public_bind", "metrics_open", "key_in_data_dir"]
    await admin.put("/security", {"registration": "closed"})
    assert "registration_open_on_public_bind" not in (await admin.get("/security")).json()["warnings"]


async def test_weak_passwords_break_one_rule_each(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    rules = {"min_length": 16, "require_digit": True, "require_upper": True, "context_words": ["acme"]}
    assert (await admin.put("/security/password-policy", rules)).status == 200
    body = {"email": "new@example.org", "full_name": "N", "password": "acme password"}
    async with asyncio.timeout(60):
        while len((refused := await admin.post("/admin/users", body)).json().get("errors", [])) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (refused.status, refused.code) == (422, "weak_password")
    codes = sorted(item["code"] for item in refused.json()["errors"])
    assert codes == ["core.context_word", "core.no_digit", "core.no_upper", "too_short"]
    assert {item["pointer"] for item in refused.json()["errors"]} == {"/password"}


async def test_admins_see_and_end_the_sessions_of_everybody(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    alice = await kit.as_user("member", "alice@example.org")
    signed = await From(kit.client, AWAY).post("/auth/login", {"email": "alice@example.org", "password": PASSWORD})
    away = From(kit.client, AWAY)
    away.token = signed.json()["access_token"]
    listed = (await admin.get(f"/security/sessions?user_id={alice.user['id']}")).json()
    assert listed["total"] == 2
    assert {item["user"]["email"] for item in listed["items"]} == {"alice@example.org"}
    assert [item["ip"] for item in (await admin.get(f"/security/sessions?ip={AWAY}")).json()["items"]] == [AWAY]
    assert sum(item["current"] for item in (await admin.get("/security/sessions")).json()["items"]) == 1
    one = (await admin.get(f"/security/sessions?ip={AWAY}")).json()["items"][0]["id"]
    assert (await admin.delete(f"/security/sessions/{one}")).status == 204
    assert (await admin.delete(f"/security/sessions/{one}")).status == 404
    assert (await away.get("/auth/me")).status == 401
    key, _ = await make_key(alice)
    path = f"/security/users/{alice.user['id']}/revoke-sessions"
    assert (await admin.post(path)).json() == {"sessions": 1, "api_keys": 0}
    assert (await alice.get("/auth/me")).status == 401
    assert (await key.get("/auth/me")).status == 200
    assert (await admin.post(path, {"include_api_keys": True})).json() == {"sessions": 0, "api_keys": 1}
    assert (await key.get("/auth/me")).status == 401
    assert (await admin.post("/security/users/01a216b4-06ab-770c-a9ce-e8400c03429a/revoke-sessions")).status == 404
    pages = (await admin.get("/security/sessions?limit=1")).json()
    assert pages["total"] == 1


class Broken:
    """Implements `Audit`; its table refuses."""

    verbose = False

    def record(self, entry: AuditEntry) -> None:
        raise Unavailable("The audit log cannot be written.", code="audit_unavailable")

    def record_request(self, route: Route, path: str, status: int, code: str | None) -> None:
        raise AssertionError("only a verbose log is told of every request")


def _audit(broken: Broken) -> Audit:
    return broken


class BrokenAuditPlugin(Plugin):
    """An audit log that cannot be written."""

    name = "audit"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Broken, Broken), Provide(Audit, _audit)]


async def test_without_the_audit_log_nothing_changes(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=["security", "settings", "tasks", "agents", "workers"], config=TRUSTING)
    admin = From(await kit.as_user("admin"), HOME)
    _, key = await make_key(admin)
    names = ["security", "settings", "tasks", "agents", "workers", BrokenAuditPlugin]
    broken: Kit = await make_kit(plugins=names, config=TRUSTING)
    again = From(admin, HOME)
    again.app = broken.application.app
    for method, path, body in (
        ("PUT", "/security", {"step_up_seconds": 100}),
        ("PUT", "/security/password-policy", {"min_length": 20}),
        ("PUT", "/security/ip-rules", {"mode": "blocklist", "rules": [{"cidr": "10.0.0.0/8", "action": "block"}]}),
        ("POST", f"/security/users/{admin.user['id']}/revoke-sessions", {}),
        ("POST", "/security/api-keys", {"name": "x"}),
        ("DELETE", f"/security/api-keys/{key['id']}", None),
    ):
        answer = await again.request(method, path, body)
        assert (answer.status, answer.code) == (503, "audit_unavailable"), (path, answer)
    assert (await again.get("/security")).json()["step_up_seconds"] == 300
    assert (await again.get("/security/ip-rules")).json()["mode"] == "off"
    assert (await again.get("/security/api-keys?status=active")).json()["total"] == 1
