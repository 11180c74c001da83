"""Credentials in what machines send: every string of every body that a machine may send is redacted or refused."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import pytest
from tests.generated.operations import Operation
from tests.generated.resources import name
from tests.generated.samples import Samples
from tests.generated.world import World

from corral.database.unit import current
from corral.testing.kit import Answer, Client

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def world(make_world: Any) -> World:
    """A world of its own for each test, because a stored secret is redacted everywhere."""
    made: World = await make_world()
    return made


VALUE = "Tr0ub4dor-9"
BASE64 = base64.b64encode(VALUE.encode()).decode()
SPELLINGS = (VALUE, BASE64)
PLANTED = "/".join(SPELLINGS)
DEEPEST = 6


def planted(schema: Mapping[str, Any], samples: Samples, depth: int = 0) -> Iterator[Any]:
    """Values for the schema, each with the credential in another place, and otherwise the least that is demanded."""
    schema = samples.resolved(schema)
    options = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    kind = schema.get("type", "string" if schema.keys() & {"pattern", "maxLength", "minLength"} else None)
    if depth > DEEPEST or schema.keys() & {"enum", "const"}:
        return
    if options:
        for option in options:
            yield from planted(option, samples, depth)
    elif kind == "string":
        yield PLANTED
    elif kind == "array":
        yield from ([each] for each in planted(schema.get("items", {}), samples, depth + 1))
    elif kind == "object":
        least = samples.of(schema)
        for field, inner in schema.get("properties", {}).items():
            yield from ({**least, field: each} for each in planted(inner, samples, depth + 1))
        if more := schema.get("additionalProperties"):
            inner = {} if more is True else more
            yield {**least, PLANTED: samples.of(inner)}
            yield from ({**least, "key": each} for each in planted(inner, samples, depth + 1))
    elif kind is None:
        yield {"key": [PLANTED], PLANTED: 1}


class Machines:
    """A worker, a registration key, an attempt and a standing agent, and the objects that they report on."""

    world: World
    claim: Any

    async def build(self, world: World) -> Machines:
        self.world = world
        agent = await world.agent(world.owner, name("standing"))
        token = await world.ok(world.owner, "POST", f"/agents/{agent}/tokens", {"name": "all", "scopes": ["*"]})
        self.agent = world.client(token["token"])
        await self.lease()
        return self

    async def lease(self) -> None:
        """Lease another task."""
        self.claim = await self.world.lease(self.world.owner, name("runner"), enabled_tools=["tasks.get", "my.*"])

    @property
    def task_id(self) -> str:
        return str(self.claim["task"]["id"])

    async def lease_if_ended(self) -> None:
        """Lease another task if the run has ended."""
        if (await self.all()["attempt"].post(f"/tasks/{self.task_id}/progress", {})).status != 200:
            await self.lease()

    def all(self) -> dict[str, Client]:
        world = self.world
        attempt = world.client(self.claim["agent_token"])
        return {"worker": world.worker, "key": world.registration_key, "agent": self.agent, "attempt": attempt}

    async def send(self, operation: Operation, by: str, body: Any, **path: str) -> Answer:
        """Call an operation on the worker or on the leased task."""
        is_fleet = operation.path.startswith("/workers")
        names = {"id": self.world.worker.user["id"] if is_fleet else self.task_id, "tool": "tasks.get", **path}
        if operation.path.endswith("/cancelled"):
            await self.world.owner.post(f"/tasks/{self.task_id}/cancel", {})
        headers = {"Corral-Lease": self.claim["lease_id"]} if by == "worker" else {}
        answer = await self.all()[by].request(operation.method, operation.at(names), body, headers=headers)
        if "/tasks/{id}/" in operation.path and answer.status not in (401, 403):
            await self.lease_if_ended()
        return answer


async def store_secret(world: World) -> None:
    """Store the secret, and wait until this process redacts it."""
    await world.ok(world.admin, "POST", "/secrets", {"name": "PLANTED", "value": VALUE})
    async with asyncio.timeout(60):
        while VALUE in world.kit.kernel.redactor.redact(VALUE):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def stored_texts() -> str:
    """Every row of every table, one a line."""
    engine: Any = current().database.engine
    tables = {table: engine.execute_sql(f'SELECT * FROM "{table}"').fetchall() for table in engine.get_tables()}
    return "\n".join(f"{table}: {row!r}" for table, found in tables.items() for row in found)


async def test_no_credential_of_a_machine_is_stored_or_shown(world: World) -> None:
    """Workers, registration keys, attempts and agents send a stored secret in each field, in plain and in base64."""
    await store_secret(world)
    machines = await Machines().build(world)
    shown, accepted = [], Counter[str]()
    for operation in world.operations:
        for by in machines.all() if operation.body_schema is not None and not operation.is_public else ():
            for body in planted(operation.body_schema or {}, operation.samples):
                if body.get("name") == "x":
                    body["name"] = name("sample")
                answer = await machines.send(operation, by, body)
                if answer.status == 401 or (answer.status == 403 and answer.code == "forbidden"):
                    break
                if answer.status < 300:
                    accepted[operation.label] += 1
                    shown += [operation.label] if any(text.encode() in answer.body for text in SPELLINGS) else []
    for operation in world.operations:
        for part in operation.route.path_parameters if not operation.is_public else ():
            for by in machines.all() if part != "id" else ():
                for text in SPELLINGS:
                    answer = await machines.send(operation, by, operation.sample_body(), **{part: quote(text, safe="")})
                    assert answer.status in (403, 404, 422), (operation.label, answer)
    assert shown == []
    stored = await world.kit.kernel.database.work(stored_texts, read=True)
    assert [line for line in stored.splitlines() if any(text in line for text in SPELLINGS)] == []
    assert stored.count("[redacted]") > 50
    assert len(accepted) >= 12


async def test_nobody_names_an_object_after_a_credential(world: World) -> None:
    """People write what they like, but identifiers with a stored secret are refused, because others see them."""
    await store_secret(world)
    for path in ("/agents", "/security/api-keys", "/workers/register", "/admin/registration-keys"):
        for text in SPELLINGS:
            body = {"name": f"my {text}", **({"scopes": ["*.read"]} if "api" in path else {})}
            answer = await world.admin.post(path, body)
            assert answer.status == 422, (path, answer)
            assert answer.json()["errors"][0]["pointer"] == "/name"


async def test_few_routes_redact_what_machines_send_themselves(world: World) -> None:
    assert {each.label for each in world.operations if each.route.redacted is False} == {
        "POST /llm/chat/completions",
        "POST /llm/embeddings",
        "POST /tasks/{id}/tools/{tool}",
        "POST /tasks/{id}/tools/calls/{call}/result",
    }
