"""Every kind of object that a path names: whose it is, and how one is made.

An operation whose path names an object of no kind here fails the tests: a new plugin registers its own with a class of
the HTTP contract (*private*, *shared*, …) and a factory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec
from tests.generated.operations import Operation
from tests.generated.world import World

from corral import clock
from corral.auth.principal import Principal
from corral.ids import new_id
from corral.testing.kit import Client
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.notifications.models import Delivery as NotificationDelivery
from corral_plugins.notifications.models import Notification
from corral_plugins.ssh.models import Connection
from corral_plugins.ssh.service.executions import SshExecutions
from corral_plugins.ssh.service.host_keys import fingerprint_of
from corral_plugins.webhooks.models import Delivery

Class = Literal["private", "account", "shared", "managed", "admin", "public"]
Names = Mapping[str, str]
Factory = Callable[[World, Client], Awaitable[Names]]


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is that of the object; what lies below it without a kind of its own goes with it.

    *private*: others get 404 on every verb, admins too; *account*: admins see it. *shared*: members and viewers read,
    owner and admin write. *managed*: read like shared, written by admins. `open`: operations that are any member's
    all the same, though they write; `owners`: reads that are the owner's. `bodies`: what suits an operation better than
    the least body, with `{name}` for what the factory gives; a text is a query.
    """

    path: str
    kind: Class
    make: Factory  # what it gives are the names of the path, and whatever else `bodies` wants
    open: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    bodies: Mapping[str, Any] = {}


RESOURCES: list[Resource] = []


def resource(
    path: str,
    kind: Class,
    *,
    open: tuple[str, ...] = (),
    owners: tuple[str, ...] = (),
    bodies: Mapping[str, Any] | None = None,
) -> Callable[[Factory], Factory]:
    """Register the factory of a kind of object."""

    def declare(make: Factory) -> Factory:
        RESOURCES.append(
            Resource(
                path=path, kind=kind, make=make, open=frozenset(open), owners=frozenset(owners), bodies=bodies or {}
            )
        )
        return make

    return declare


def asked(operation: Operation, names: Names) -> tuple[str, Any]:
    """A path with its query, and a body, that the operation would take for this object."""
    given = next((each.bodies[operation.label] for each in RESOURCES if operation.label in each.bodies), None)
    if isinstance(given, str):
        return operation.at(names) + given.format_map(names), operation.sample_body()
    body = operation.sample_body() if given is None else {key: _filled(value, names) for key, value in given.items()}
    return operation.at(names) + operation.sample_query(), body


def _filled(value: Any, names: Names) -> Any:
    if isinstance(value, list):
        return [_filled(each, names) for each in value]
    return names[value[1:-1]] if isinstance(value, str) and value.startswith("{") else value


def of(operation: Operation) -> Resource:
    """The kind of object that the operation's path names last."""
    found = [each for each in RESOURCES if (operation.path + "/").startswith(each.path + "/")]
    assert found, f"{operation.label} names an object of no kind: register one in {__name__}"
    longest = max(found, key=lambda each: len(each.path))
    missing = operation.path[len(longest.path) :].count("{")
    assert not missing, f"{operation.label} names an object below {longest.path}: register it in {__name__}"
    return longest


_names = iter(range(1, 10**6))


def name(word: str) -> str:
    """A name that nothing has yet."""
    return f"{word}-{next(_names)}"


# -- agents


@resource(
    "/agents/{id}",
    "shared",
    open=("POST /agents/{id}/clone",),
    owners=("GET /agents/{id}/tokens",),
    bodies={
        "POST /agents/{id}/clone": {"name": "copy-of-it"},
        "POST /agents/{id}/tokens": {"name": "token", "scopes": ["tasks.read"]},
        "POST /agents/{id}/rollback": {"version": 1},
        "GET /agents/{id}/versions/compare": "?from=1&to=1",
    },
)
async def agent(world: World, owner: Client) -> Names:
    return {"id": await world.agent(owner, name("agent"))}


@resource("/agents/{id}/versions/{n}", "shared")
async def agent_version(world: World, owner: Client) -> Names:
    return {**await agent(world, owner), "n": "1"}


@resource("/agents/{id}/tokens/{token_id}", "shared")
async def agent_token(world: World, owner: Client) -> Names:
    made = await agent(world, owner)
    body = {"name": name("token"), "scopes": ["tasks.read"]}
    token = await world.ok(owner, "POST", f"/agents/{made['id']}/tokens", body)
    return {**made, "token_id": token["id"]}


# -- tasks and their tool calls


@resource("/tasks/{id}", "shared", open=("POST /tasks/{id}/comments",))
async def task(world: World, owner: Client) -> Names:
    return {"id": (await world.ok(owner, "POST", "/tasks", {"title": name("task")}))["id"]}


@resource("/tasks/{id}/attempts/{fence}", "shared")
async def attempt(world: World, owner: Client) -> Names:
    claim = await world.lease(owner, name("runner"))
    return {"id": claim["task"]["id"], "fence": str(claim["fence"])}


@resource("/tasks/{id}/tools/{tool}", "shared")
async def tool_of_task(world: World, owner: Client) -> Names:
    return {**await task(world, owner), "tool": "tasks.get"}


@resource("/tasks/{id}/tools/calls/{call}", "shared")
async def tool_call(world: World, owner: Client) -> Names:
    claim = await world.lease(owner, name("caller"), enabled_tools=["tasks.get"])
    task_id, call = claim["task"]["id"], name("call")
    body = {"call_id": call, "arguments": {"task_id": task_id}}
    await world.ok(world.client(claim["agent_token"]), "POST", f"/tasks/{task_id}/tools/tasks.get", body)
    return {"id": task_id, "call": call}


@resource("/tools/{name}", "managed", bodies={"POST /tools/{name}/check": {"agent_id": "{agent_id}"}})
async def tool(world: World, owner: Client) -> Names:
    return {"name": "tasks.get", "agent_id": (await agent(world, owner))["id"]}


@resource(
    "/tools/mcp-servers/{name}",
    "admin",
    bodies={
        "POST /tools/mcp-servers": {"name": "sample", "url": "http://1.1.1.1/mcp"},
        "POST /tools/mcp-servers/{name}/accept": {"definition_sha256": ["{sha256}"]},
    },
)
async def mcp_server(world: World, owner: Client) -> Names:
    body = {"name": name("server"), "url": "http://1.1.1.1/mcp"}
    made = await world.ok(world.admin, "POST", "/tools/mcp-servers", body)
    breakers: Any = world.kit.service(Breakers)
    await breakers.sync()  # what the breaker of the server counted is not an effect of the next request
    return {"name": made["name"], "sha256": made["tools"][0]["definition_sha256"]}


# -- messages


@resource(
    "/messages/{id}",
    "shared",
    bodies={
        "POST /messages/send": {"body": "Hello", "channel": "news"},
        "POST /messages/{id}/ack": {"result": "done"},
    },
)
async def message(world: World, owner: Client) -> Names:
    body = {"body": "Hello", "recipient_agent_id": (await agent(world, owner))["id"]}
    return {"id": (await world.ok(owner, "POST", "/messages/send", body))["id"]}


@resource("/messages/threads/{thread_id}", "shared")
async def thread(world: World, owner: Client) -> Names:
    return {"thread_id": (await message(world, owner))["id"]}


# -- dead letters


@resource("/dead-letter/{id}", "admin")
async def dead_letter(world: World, owner: Client) -> Names:
    task_id = (await task(world, owner))["id"]
    return {"id": (await world.ok(world.admin, "POST", "/dead-letter", {"task_id": task_id}))["id"]}


@resource("/dead-letter/batches/{id}", "admin")
async def dead_letter_batch(world: World, owner: Client) -> Names:
    answer = await world.admin.post("/dead-letter/retry-all", {"max": 1, "filter": {"until": "2000-01-01T00:00:00Z"}})
    body = answer.json()
    return {"id": body["id"] if answer.status == 202 else body["existing_id"]}


# -- approvals


@resource("/approvals/{id}", "shared", open=("POST /approvals/{id}/comments",))
async def approval(world: World, owner: Client) -> Names:
    return {"id": (await world.ok(owner, "POST", "/approvals", {"title": name("approval")}))["id"]}


@resource("/approvals/{id}/approve", "shared", open=("POST /approvals/{id}/approve",))
async def approval_to_decide(world: World, owner: Client) -> Names:
    return await approval(world, world.admin)


for _verb in ("reject", "request-revision"):
    RESOURCES.append(
        Resource(
            path=f"/approvals/{{id}}/{_verb}",
            kind="shared",
            make=approval_to_decide,
            open=frozenset({f"POST /approvals/{{id}}/{_verb}"}),
        )
    )


# -- code reviews

PATCH = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+two\n"
REVIEW = "/code-reviews/{id}"


@resource(
    REVIEW,
    "shared",
    open=tuple(f"POST {REVIEW}/{verb}" for verb in ("comment", "approve", "reject", "request-changes")),
    bodies={f"POST {REVIEW}/revisions": {"patch": PATCH}},
)
async def code_review(world: World, owner: Client) -> Names:
    agent_id = await world.agent(owner, name("author"))
    body = {"title": name("review"), "agent_id": agent_id, "patch": PATCH}
    return {"id": (await world.ok(owner, "POST", "/code-reviews", body))["id"]}


@resource(
    f"{REVIEW}/comments/{{comment_id}}",
    "shared",
    open=tuple(f"POST {REVIEW}/comments/{{comment_id}}/{verb}" for verb in ("resolve", "reopen")),
)
async def code_review_comment(world: World, owner: Client) -> Names:
    made = await code_review(world, owner)
    comment = await world.ok(owner, "POST", f"/code-reviews/{made['id']}/comment", {"body": "Why?"})
    return {**made, "comment_id": comment["id"]}


# -- triggers

ACTION = {"type": "create_task", "title": "sample"}


@resource(
    "/triggers/{id}",
    "shared",
    open=("POST /triggers/{id}/test",),
    bodies={"POST /triggers/{id}/fire": {"payload": {"name": "sample"}}},
)
async def trigger(world: World, owner: Client) -> Names:
    body = {"name": name("trigger"), "type": "webhook", "config": {}, "action": ACTION}
    return {"id": (await world.ok(owner, "POST", "/triggers", body))["id"]}


@resource("/hooks/{token}", "public")
async def webhook(world: World, owner: Client) -> Names:
    body = {"name": name("webhook"), "type": "webhook", "config": {}, "action": ACTION}
    made = await world.ok(owner, "POST", "/triggers", body)
    return {"token": made["ingress_url"].rpartition("/")[2]}


# -- webhooks


@resource(
    "/webhooks/{id}",
    "private",
    bodies={"POST /webhooks/{id}/recover": {"since": clock.now()}},
)
async def outgoing_webhook(world: World, owner: Client) -> Names:
    body = {"url": "http://receiver.invalid/hook", "events": ["task.completed"]}
    return {"id": (await world.ok(owner, "POST", "/webhooks", body))["id"]}


RESOURCES.append(Resource(path="/webhooks/{id}/disable", kind="account", make=outgoing_webhook))


@resource("/webhooks/{id}/deliveries/{delivery_id}", "private")
async def webhook_delivery(world: World, owner: Client) -> Names:
    made = await outgoing_webhook(world, owner)
    row = {"id": new_id(), "webhook_id": made["id"], "event_id": new_id(), "event": "task.completed", "payload": "{}"}
    ended = {"subject": {}, "status": "failed", "created_at": clock.now(), "finished_at": clock.now()}
    await world.kit.work(lambda: Delivery.create(**row, **ended))
    return {**made, "delivery_id": row["id"]}


# -- notifications

RULE = {"name": "sample", "events": ["task.failed"]}


@resource("/notifications/{id}", "private")
async def notification(world: World, owner: Client) -> Names:
    row = {"id": new_id(), "user_id": owner.user["id"], "type": "task.failed", "severity": "error", "title": "A task"}
    rest = {"body": "", "group_key": "key", "created_at": clock.now(), "last_at": clock.now()}
    await world.kit.work(lambda: Notification.create(**row, **rest))
    return {"id": row["id"]}


@resource(
    "/notifications/channels/{id}",
    "admin",
    bodies={
        "POST /notifications/channels": {"name": "sample", "type": "email", "config": {"to": ["a@example.org"]}},
    },
)
async def notification_channel(world: World, owner: Client) -> Names:
    body = {"name": name("channel"), "type": "webhook", "config": {"url": "http://receiver.invalid/hook"}}
    return {"id": (await world.ok(world.admin, "POST", "/notifications/channels", body))["id"]}


@resource("/notifications/rules/{id}", "admin", bodies={"POST /notifications/rules": RULE})
async def notification_rule(world: World, owner: Client) -> Names:
    body = {**RULE, "name": name("rule")}
    return {"id": (await world.ok(world.admin, "POST", "/notifications/rules", body))["id"]}


@resource("/notifications/deliveries/{id}", "admin")
async def notification_delivery(world: World, owner: Client) -> Names:
    made = await notification_channel(world, owner)
    row: dict[str, Any] = {"id": new_id(), "channel_id": made["id"], "group_key": "key", "severity": "error"}
    row |= {"items": []}
    ended = {"status": "failed", "created_at": clock.now(), "finished_at": clock.now()}
    await world.kit.work(lambda: NotificationDelivery.create(**row, **ended))
    return {"id": row["id"]}


# -- files

FORM = {"Content-Type": "multipart/form-data; boundary=x"}
UPLOAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\na file\r\n--x--\r\n'


@resource("/files/{id}", "private")
async def file(world: World, owner: Client) -> Names:
    return {"id": (await world.ok(owner, "POST", "/files/upload", content=UPLOAD, headers=FORM))["id"]}


@resource(
    "/files/{id}/content",
    "public",
    bodies={"GET /files/{id}/content": "?expires={expires}&signature={signature}"},
)
async def link(world: World, owner: Client) -> Names:
    made = await file(world, owner)
    link = await world.ok(owner, "GET", f"/files/{made['id']}/url")
    pairs = dict(pair.split("=") for pair in link["url"].partition("?")[2].split("&"))
    return {**made, **pairs}


# -- workers


@resource("/workers/{id}", "managed", owners=("GET /workers/{id}/tasks",))
async def worker(world: World, owner: Client) -> Names:
    return {"id": (await world.machine(name("worker"))).user["id"]}


RESOURCES.append(Resource(path="/admin/workers/{id}", kind="admin", make=worker))


@resource("/admin/registration-keys/{id}", "admin")
async def registration_key(world: World, owner: Client) -> Names:
    return {"id": (await world.ok(world.admin, "POST", "/admin/registration-keys", {"name": name("key")}))["id"]}


# -- people


@resource("/admin/users/{id}", "admin")
async def user(world: World, owner: Client) -> Names:
    return {"id": (await world.user_like("member", f"{name('person')}@example.org")).user["id"]}


@resource("/auth/sessions/{id}", "private")
async def session(world: World, owner: Client) -> Names:
    fresh = world.client((await world.again(owner))["access_token"])
    found = await world.ok(fresh, "GET", "/auth/sessions")
    return {"id": next(each["id"] for each in found["items"] if each["current"])}


RESOURCES.append(Resource(path="/security/sessions/{id}", kind="admin", make=session))
RESOURCES.append(Resource(path="/security/users/{id}", kind="admin", make=user))


@resource("/admin/invitations/{id}", "admin")
async def invitation(world: World, owner: Client) -> Names:
    body = {"email": f"{name('guest')}@example.org"}
    return {"id": (await world.ok(world.admin, "POST", "/admin/invitations", body))["id"]}


@resource("/security/api-keys/{id}", "account")
async def api_key(world: World, owner: Client) -> Names:
    body = {"name": name("key"), "scopes": ["*.read"]}
    return {"id": (await world.ok(owner, "POST", "/security/api-keys", body))["id"]}


# -- models and what they cost


@resource("/llm/models/{model}", "managed")
async def model(world: World, owner: Client) -> Names:
    return {"model": "scripted/echo"}


@resource("/llm/providers/{name}", "admin")
async def provider(world: World, owner: Client) -> Names:
    made = {"name": name("provider"), "kind": "scripted", "models": [{"id": "echo"}]}
    return {"name": (await world.ok(world.admin, "POST", "/llm/providers", made))["name"]}


@resource("/llm/calls/{id}", "account")
async def model_call(world: World, owner: Client) -> Names:
    asked = {"model": "scripted/echo", "messages": [{"role": "user", "content": name("word")}]}
    await world.ok(owner, "POST", "/llm/chat/completions", asked)
    return {"id": (await world.ok(owner, "GET", "/llm/calls?limit=1"))["items"][0]["id"]}


@resource("/cost/events/{id}", "account")
async def cost_event(world: World, owner: Client) -> Names:
    body = {"usage_key": new_id(), "provider": "other", "cost_usd": 1, "user_id": owner.user["id"]}
    return {"id": (await world.ok(world.admin, "POST", "/cost/events", body))["id"]}


@resource("/cost/prices/{id}", "managed")
async def price(world: World, owner: Client) -> Names:
    body = {"provider": name("provider"), "model": "*", "input_usd": 1, "output_usd": 1}
    return {"id": (await world.ok(world.admin, "POST", "/cost/prices", body))["id"]}


# -- workflows and their runs


@resource(
    "/workflows/{id}",
    "shared",
    open=("POST /workflows/{id}/validate", "POST /workflows/{id}/clone", "POST /workflows/{id}/run"),
    bodies={
        "POST /workflows/{id}/steps": {"name": "another", "step_type": "transform", "config": {"value": 1}},
        "POST /workflows/{id}/rollback": {"version": 1},
    },
)
async def workflow(world: World, owner: Client) -> Names:
    step = {"name": "first", "step_type": "transform", "config": {"value": 1}}
    made = await world.ok(owner, "POST", "/workflows", {"name": name("workflow"), "steps": [step]})
    return {"id": made["id"], "step_id": made["steps"][0]["id"]}


@resource("/workflows/{id}/steps/{step_id}", "shared")
async def workflow_step(world: World, owner: Client) -> Names:
    return await workflow(world, owner)


@resource("/workflows/{id}/versions/{n}", "shared")
async def workflow_version(world: World, owner: Client) -> Names:
    return {**await workflow(world, owner), "n": "1"}


@resource("/workflow-runs/{id}", "shared", open=("POST /workflow-runs/{id}/retry",))
async def workflow_run(world: World, owner: Client) -> Names:
    made = await workflow(world, owner)
    return {"id": (await world.ok(owner, "POST", f"/workflows/{made['id']}/run", {}))["id"]}


@resource(
    "/workflow-runs/{id}/steps/{name}",
    "shared",
    open=("POST /workflow-runs/{id}/steps/{name}/input",),
)
async def workflow_run_step(world: World, owner: Client) -> Names:
    return {**await workflow_run(world, owner), "name": "first"}


# -- the marketplace

MANIFEST = {
    "schema": "corral.template/1",
    "slug": "sample-template",
    "name": "Sample",
    "version": "1.0.0",
    "category": "sample",
    "description": "A sample.",
    "resources": [{"kind": "agent", "key": "agent", "spec": {"name": "Sample"}}],
}


@resource(
    "/marketplace/templates/{template}",
    "managed",
    open=("POST /marketplace/templates/{template}/install",),
    bodies={"POST /marketplace/templates": MANIFEST, "POST /marketplace/templates/validate": MANIFEST},
)
async def template(world: World, owner: Client) -> Names:
    made = await world.ok(world.admin, "POST", "/marketplace/templates", {**MANIFEST, "slug": name("template")})
    return {"template": made["slug"]}


@resource(
    "/marketplace/installations/{id}",
    "shared",
    bodies={"POST /marketplace/installations/{id}/upgrade": {"parameters": {"language": "French"}}},
)
async def installation(world: World, owner: Client) -> Names:
    body = {"parameters": {"language": name("language")}}
    made = await world.ok(owner, "POST", "/marketplace/templates/hello-fleet/install", body)
    return {"id": made["id"]}


# -- the installation


@resource("/plugins/{name}", "admin")
async def plugin(world: World, owner: Client) -> Names:
    return {"name": "realtime"}


@resource("/plugins/{name}/schedules/{schedule}", "admin")
async def schedule(world: World, owner: Client) -> Names:
    return {"name": "workers", "schedule": "workers.prune"}


@resource("/settings/{category}/{key}", "admin", bodies={"PUT /settings/{category}/{key}": {"value": 60}})
async def setting(world: World, owner: Client) -> Names:
    return {"category": "tasks", "key": "lease_seconds"}


@resource("/secrets/{id}", "admin", bodies={"POST /secrets/{id}/reveal": {"reason": "to be sure"}})
async def secret(world: World, owner: Client) -> Names:
    body = {"name": name("secret"), "value": name("value-of-it")}
    return {"id": (await world.ok(world.admin, "POST", "/secrets", body))["id"]}


@resource("/secrets/{id}/restore", "admin")
async def deleted_secret(world: World, owner: Client) -> Names:
    made = await secret(world, owner)
    await world.ok(world.admin, "DELETE", f"/secrets/{made['id']}")
    return made


@resource("/tasks/{id}/secrets/{name}", "shared")
async def secret_of_task(world: World, owner: Client) -> Names:
    return {**await task(world, owner), "name": "sample"}


@resource("/secrets/{id}/versions/{n}", "admin")
async def secret_version(world: World, owner: Client) -> Names:
    made = await secret(world, owner)
    await world.ok(world.admin, "POST", f"/secrets/{made['id']}/rotate", {})
    return {**made, "n": "1"}


@resource("/admin/audit/{id}", "admin")
async def audit_row(world: World, owner: Client) -> Names:
    return {"id": (await world.ok(world.admin, "GET", "/admin/audit?limit=1"))["items"][0]["id"]}


@resource("/problems/{code}", "public")
async def problem(world: World, owner: Client) -> Names:
    return {"code": "not_found"}


# -- machines


@resource(
    "/ssh-connections/{id}",
    "admin",
    bodies={
        "POST /ssh-connections": {"name": "sample", "hostname": "machine.invalid", "username": "sample"},
        "POST /ssh-connections/{id}/execute": {"command": "true"},
        "POST /ssh-connections/{id}/host-key/accept": {"fingerprint": "{fingerprint}"},
    },
)
async def ssh_connection(world: World, owner: Client) -> Names:
    body = {"name": name("machine"), "hostname": "machine.invalid", "username": "sample"}
    made = await world.ok(world.admin, "POST", "/ssh-connections", body)
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBmB4xDzdqC0Hz4TvVzQ3wL0Yh5m3xq7dSgkYb0zN1xA"
    seen = Connection.update(seen_key=key, host_key_state="pending").where(Connection.id == made["id"])
    await world.kit.kernel.database.work(seen.execute)
    return {"id": made["id"], "fingerprint": str(fingerprint_of(key))}


@resource("/ssh-connections/{id}/executions/{execution_id}", "admin")
async def ssh_execution(world: World, owner: Client) -> Names:
    made, executions = await ssh_connection(world, owner), world.kit.service(SshExecutions)
    by = Principal(kind="user", id=world.admin.user["id"])

    def start() -> str:
        row = Connection.get_by_id(made["id"])
        return str(executions.start(row, "true", shown_command="true", by=by).id)

    return {"id": made["id"], "execution_id": await world.kit.kernel.database.work(start)}


# -- circuit breakers


@resource("/circuit-breakers/{name}", "admin")
async def circuit_breaker(world: World, owner: Client) -> Names:
    body = {"name": f"http:{name('host')}.example.org"}
    return {"name": (await world.ok(world.admin, "POST", "/circuit-breakers", body))["name"]}
