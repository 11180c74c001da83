"""Every operation that writes and is an admin's alone leaves a row with the change, whichever plugins are active.

An operation that is not known here fails the test: say in `CALLS` how it succeeds, or in `CHANGES_NOTHING` why it
leaves no row.
"""

from __future__ import annotations

import base64
import itertools
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyotp
import pytest
from tests.generated.operations import Operation, operations

from corral import clock
from corral.ids import new_id
from corral.testing.kit import PASSWORD, Client, Kit
from corral_plugins.notifications.models import Delivery

CHANGES_NOTHING = {
    "POST /egress/check": "it judges an address",
    "POST /security/ip-rules/check": "it judges an address",
    "POST /settings/test-mail": "it sends a mail to try the settings",
    "POST /ssh-connections/{id}/test": "it logs in on a machine",
    "POST /notifications/channels/{id}/test": "it sends a test",
    "POST /notifications/rules/{id}/test": "it reads past events",
    "POST /llm/providers/{name}/test": "it asks the provider a question",
    "POST /llm/providers/{name}/refresh": "it reads the provider's list of models",
}
ELSEWHERE = {
    "POST /secrets/rotate-master-key": "with a second key: `test_a_change_of_master_keys_is_recorded`",
    **dict.fromkeys(
        (
            "POST /tools/mcp-servers",
            "PUT /tools/mcp-servers/{name}",
            "DELETE /tools/mcp-servers/{name}",
            "POST /tools/mcp-servers/{name}/refresh",
            "POST /tools/mcp-servers/{name}/accept",
        ),
        "with a server: `tests/plugins/tools/test_mcp.py`",
    ),
    **dict.fromkeys(
        (
            "POST /ssh-connections/{id}/execute",
            "POST /ssh-connections/{id}/host-key/accept",
            "POST /ssh-connections/{id}/executions/{execution_id}/cancel",
        ),
        "with a machine: `tests/plugins/ssh/test_done_when.py`",
    ),
}
TEMPLATE = {
    "schema": "corral.template/1",
    "slug": "another",
    "name": "A template",
    "version": "1.0.0",
    "category": "test",
    "description": "A template.",
    "resources": [{"kind": "agent", "key": "agent", "spec": {"name": "An agent"}}],
}
_numbers = itertools.count(1)


class Site:
    """An admin who has stepped up, and what they need to have made before."""

    def __init__(self, kit: Kit, admin: Client) -> None:
        self.kit, self.admin = kit, admin

    async def ok(self, method: str, path: str, body: Any = None, *, by: Client | None = None) -> Any:
        answer = await (by or self.admin).request(method, path, body)
        assert answer.status < 300, (method, path, answer)
        return answer.json() if answer.body else None

    async def template(self) -> dict[str, str]:
        return {"template": (await self.ok("POST", "/marketplace/templates", TEMPLATE))["slug"]}

    async def user(self) -> dict[str, str]:
        return {"id": (await self.kit.as_user("member")).user["id"]}

    async def with_second_factor(self) -> dict[str, str]:
        user = await self.kit.as_user("member")
        made = await self.ok("POST", "/auth/mfa/setup", {"password": PASSWORD}, by=user)
        await self.ok("POST", "/auth/mfa/verify", {"code": pyotp.TOTP(made["secret"]).now()}, by=user)
        return {"id": user.user["id"]}

    async def locked(self) -> dict[str, str]:
        user = await self.kit.as_user("member")
        for _ in range(5):
            wrong = {"email": user.user["email"], "password": "wrong wrong wrong"}
            await self.kit.client.post("/auth/login", wrong)
        return {"id": user.user["id"]}

    async def session(self) -> dict[str, str]:
        user = await self.kit.as_user("member")
        return {"id": (await self.ok("GET", "/auth/me", by=user))["session"]["id"]}

    async def invitation(self) -> dict[str, str]:
        made = await self.ok("POST", "/admin/invitations", {"email": f"guest{next(_numbers)}@example.org"})
        return {"id": made["id"]}

    async def key(self) -> dict[str, str]:
        return {"id": (await self.ok("POST", "/admin/registration-keys", {"name": f"key{next(_numbers)}"}))["id"]}

    async def worker(self) -> dict[str, str]:
        made = await self.ok("POST", "/workers/register", {"name": f"worker{next(_numbers)}"})
        return {"id": made["id"]}

    async def approved(self) -> dict[str, str]:
        made = await self.worker()
        await self.ok("PATCH", f"/admin/workers/{made['id']}/approve", {"is_approved": True})
        return made

    async def draining(self) -> dict[str, str]:
        made = await self.approved()
        await self.ok("POST", f"/admin/workers/{made['id']}/drain")
        return made

    async def price(self) -> dict[str, str]:
        body = {"provider": f"p{next(_numbers)}", "model": "m", "input_usd": 1, "output_usd": 1}
        return {"id": (await self.ok("POST", "/cost/prices", body))["id"]}

    async def provider(self) -> dict[str, str]:
        body = {"name": f"provider{next(_numbers)}", "kind": "scripted", "models": [{"id": "echo"}]}
        return {"name": (await self.ok("POST", "/llm/providers", body))["name"]}

    async def secret(self) -> dict[str, str]:
        body = {"name": f"secret{next(_numbers)}", "value": "a value of the test 1"}
        made = await self.ok("POST", "/secrets", body)
        await self.ok("POST", f"/secrets/{made['id']}/rotate", {"value": "a value of the test 2"})
        return {"id": made["id"], "n": "1"}

    async def gone_secret(self) -> dict[str, str]:
        made = await self.secret()
        await self.ok("DELETE", f"/secrets/{made['id']}")
        return made

    async def changed_setting(self) -> dict[str, str]:
        await self.ok("PUT", "/settings/audit/retention_days", {"value": next(_numbers) + 30})
        return {"category": "audit", "key": "retention_days"}

    async def breaker(self) -> dict[str, str]:
        return {"name": (await self.ok("POST", "/circuit-breakers", {"name": f"http:host{next(_numbers)}"}))["name"]}

    async def machine(self) -> dict[str, str]:
        body = {"name": f"machine{next(_numbers)}", "hostname": "10.1.2.3", "username": "deploy"}
        return {"id": (await self.ok("POST", "/ssh-connections", body))["id"]}

    async def channel(self) -> dict[str, str]:
        body = {"name": f"channel{next(_numbers)}", "type": "email", "config": {"to": ["ops@example.org"]}}
        return {"id": (await self.ok("POST", "/notifications/channels", body))["id"]}

    async def rule(self) -> dict[str, str]:
        body = {"name": f"rule{next(_numbers)}", "events": ["task.failed"]}
        return {"id": (await self.ok("POST", "/notifications/rules", body))["id"]}

    async def failed_delivery(self) -> dict[str, str]:
        made = await self.channel()
        row: dict[str, Any] = {"id": new_id(), "channel_id": made["id"], "group_key": "key", "severity": "error"}
        row |= {"items": [], "status": "failed", "created_at": clock.now(), "finished_at": clock.now()}
        await self.kit.work(lambda: Delivery.create(**row))
        return {"id": row["id"]}

    async def task(self) -> dict[str, str]:
        return {"task_id": (await self.ok("POST", "/tasks", {"title": "abandoned"}))["id"]}

    async def dead_letter(self) -> dict[str, str]:
        return {"id": (await self.ok("POST", "/dead-letter", await self.task()))["id"]}

    async def batch(self) -> dict[str, str]:
        for _ in range(3):
            await self.dead_letter()
        made = (await self.admin.post("/dead-letter/retry-all", {"rate_per_second": 1})).json()
        return {"id": made.get("id") or made["existing_id"]}

    async def closed_plugin(self) -> dict[str, str]:
        await self.ok("POST", "/plugins/realtime/disable", {})
        return {"name": "realtime"}


Make = Callable[[Site], Awaitable[dict[str, str]]]


def named(**names: str) -> Make:
    async def make(site: Site) -> dict[str, str]:
        return names

    return make


NONE = named()
THE_NAMES = object()  # the body is what was made
CALLS: dict[str, tuple[Make, Any]] = {
    "POST /plugins/{name}/disable": (named(name="realtime"), {}),
    "POST /plugins/{name}/enable": (Site.closed_plugin, {}),
    "PUT /plugins/{name}/config": (named(name="cost"), {"settings": {"cost.event_retention_days": 400}}),
    "POST /plugins/{name}/schedules/{schedule}/run": (named(name="cost", schedule="cost.prune"), None),
    "PUT /settings/bulk": (NONE, {"settings": {"audit.retention_days": 45}}),
    "PUT /settings/{category}/{key}": (named(category="audit", key="retention_days"), {"value": 46}),
    "POST /settings/{category}/{key}/reset": (Site.changed_setting, {}),
    "POST /admin/users": (
        NONE,
        {"email": "new@example.org", "full_name": "New", "password": "correct horse battery"},
    ),
    "PATCH /admin/users/{id}": (Site.user, {"role": "viewer"}),
    "POST /admin/users/{id}/unlock": (Site.locked, {}),
    "POST /admin/users/{id}/reset-password": (Site.user, {}),
    "POST /admin/users/{id}/reset-mfa": (Site.with_second_factor, {}),
    "POST /admin/invitations": (NONE, {"email": "guest@example.org"}),
    "DELETE /admin/invitations/{id}": (Site.invitation, None),
    "POST /admin/kill-switch": (NONE, {"engaged": True, "reason": "a test"}),
    "POST /circuit-breakers": (NONE, {"name": "http:example.org"}),
    "DELETE /circuit-breakers/{name}": (Site.breaker, None),
    "POST /circuit-breakers/{name}/force-open": (Site.breaker, {}),
    "POST /circuit-breakers/{name}/force-close": (Site.breaker, {}),
    "POST /circuit-breakers/{name}/reset": (Site.breaker, None),
    "POST /dead-letter": (Site.task, THE_NAMES),
    "DELETE /dead-letter/{id}": (Site.dead_letter, None),
    "POST /dead-letter/{id}/retry": (Site.dead_letter, {}),
    "POST /dead-letter/discard-all": (Site.dead_letter, {"filter": {"reason": "manual"}}),
    "POST /dead-letter/batches/{id}/cancel": (Site.batch, None),
    "POST /dead-letter/retry-all": (Site.dead_letter, {}),
    "POST /ssh-connections": (NONE, {"name": "machine", "hostname": "10.1.2.3", "username": "deploy"}),
    "PUT /ssh-connections/{id}": (Site.machine, {"description": "other"}),
    "DELETE /ssh-connections/{id}": (Site.machine, None),
    "POST /notifications/channels": (
        NONE,
        {"name": "ops", "type": "email", "config": {"to": ["ops@example.org"]}},
    ),
    "PUT /notifications/channels/{id}": (Site.channel, {"is_enabled": False}),
    "DELETE /notifications/channels/{id}": (Site.channel, None),
    "POST /notifications/rules": (NONE, {"name": "failures", "events": ["task.failed"]}),
    "PUT /notifications/rules/{id}": (Site.rule, {"enabled": False}),
    "DELETE /notifications/rules/{id}": (Site.rule, None),
    "POST /notifications/deliveries/{id}/retry": (Site.failed_delivery, None),
    "PUT /cost/budget": (NONE, {"monthly_limit": 12}),
    "POST /cost/prices": (NONE, {"provider": "p", "model": "m", "input_usd": 1, "output_usd": 1}),
    "PUT /cost/prices/{id}": (Site.price, {"input_usd": 2}),
    "DELETE /cost/prices/{id}": (Site.price, None),
    "POST /secrets": (NONE, {"name": "token", "value": "a value of the test"}),
    "PUT /secrets/{id}": (Site.secret, {"description": "other"}),
    "DELETE /secrets/{id}": (Site.secret, None),
    "POST /secrets/{id}/rotate": (Site.secret, {"value": "a value of the test 3"}),
    "POST /secrets/{id}/reveal": (Site.secret, {"reason": "a test"}),
    "POST /secrets/{id}/versions/{n}/restore": (Site.secret, {}),
    "DELETE /secrets/{id}/versions/{n}": (Site.secret, None),
    "POST /secrets/{id}/restore": (Site.gone_secret, {}),
    "PUT /security": (NONE, {"registration": "closed"}),
    "PUT /security/password-policy": (NONE, {"min_length": 13}),
    "PUT /security/ip-rules": (NONE, {"mode": "blocklist", "rules": [{"cidr": "198.51.100.0/24", "action": "block"}]}),
    "DELETE /security/sessions/{id}": (Site.session, None),
    "POST /security/users/{id}/revoke-sessions": (Site.user, {}),
    "PATCH /tools/{name}": (named(name="tasks.get"), {"enabled": False}),
    "PATCH /admin/workers/{id}/approve": (Site.worker, {"is_approved": True}),
    "PATCH /admin/workers/{id}": (Site.worker, {"name": "renamed"}),
    "POST /admin/workers/{id}/drain": (Site.approved, {}),
    "POST /admin/workers/{id}/resume": (Site.draining, {}),
    "POST /admin/workers/{id}/rotate-token": (Site.approved, {}),
    "DELETE /admin/workers/{id}": (Site.worker, None),
    "POST /marketplace/templates": (NONE, {**TEMPLATE, "slug": "of-a-test"}),
    "DELETE /marketplace/templates/{template}": (Site.template, None),
    "POST /admin/registration-keys": (NONE, {"name": "site"}),
    "DELETE /admin/registration-keys/{id}": (Site.key, None),
    "POST /llm/providers": (NONE, {"name": "own", "kind": "scripted", "models": [{"id": "echo"}]}),
    "PUT /llm/providers/{name}": (Site.provider, {"enabled": False}),
    "DELETE /llm/providers/{name}": (Site.provider, None),
}


@pytest.fixture
async def site(make_kit: Callable[..., Any]) -> Site:
    kit = await make_kit()
    admin = await kit.as_user("admin")
    assert (await admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    return Site(kit, admin)


async def test_every_writing_operation_of_admins_leaves_a_row(site: Site) -> None:
    privileged = {endpoint.label for endpoint in site.kit.application.endpoints if endpoint.privileged}
    served = [each for each in await operations(site.kit) if each.method != "GET" and each.label in privileged]
    known = {*CALLS, *CHANGES_NOTHING, *ELSEWHERE}
    unknown = [each.label for each in served if each.label not in known]
    assert unknown == [], "say in CALLS how they succeed"
    silent = [each.label for each in served if each.label in CALLS and not await _rows_of(site, each)]
    assert silent == []
    assert len(served) > 40


async def _rows_of(site: Site, operation: Operation) -> list[Any]:
    make, body = CALLS[operation.label]
    names = await make(site)
    path, body = operation.at(names), names if body is THE_NAMES else body
    request_id = f"audited-{next(_numbers)}"
    headers = {"x-request-id": request_id}
    answer = await site.admin.request(operation.method, path, body, headers=headers)
    assert answer.status < 300, f"{operation.label} with {body}: {answer}"
    rows = (await site.admin.get(f"/admin/audit?request_id={request_id}")).json()["items"]
    assert all(row["actor"]["id"] == site.admin.user["id"] for row in rows), rows
    if operation.path == "/admin/kill-switch":
        await site.ok("POST", "/admin/kill-switch", {"engaged": False})
    return [row for row in rows if row["outcome"] == "success"]


async def test_a_change_of_master_keys_is_recorded(make_kit: Callable[..., Any], tmp_path: Path) -> None:
    old, new = (f"v{n}:{base64.b64encode(secrets.token_bytes(32)).decode()}" for n in (1, 2))
    first = await make_kit(config={"keys.master_key": old})
    admin = await first.as_user("admin")
    body = {"name": "token", "value": "a value of the test"}
    assert (await admin.post("/secrets", body)).status == 201
    second = await make_kit(config={"keys.master_key": f"{new},{old}"})
    admin = await second.as_user("admin", "other@example.org")
    answer = await admin.post("/secrets/rotate-master-key", headers={"x-request-id": "rotation"})
    assert answer.status < 300, answer
    rows = (await admin.get("/admin/audit?request_id=rotation")).json()["items"]
    assert [row["action"].split(".")[0] for row in rows] == ["secrets"]
