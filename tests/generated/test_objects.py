"""Two members and an object of one of them, for every operation whose path names an object.

*private* -> 404 on every verb, *shared* -> read, but not write, *admin* -> 403; and whoever is refused changes nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.generated import rights, tables
from tests.generated.operations import Operation
from tests.generated.resources import RESOURCES, Names, Resource, asked, of
from tests.generated.world import World
from tests.shared_kernels import on_the_loop_of_the_module

from corral.testing.kit import Answer, Client

pytestmark = pytest.mark.one_engine

READABLE = (200, 202, 204, 304, 409, 410)
BEYOND = 502
"""The answer of an operation that reached for a machine which does not exist: nothing here refused it."""


def named(world: World) -> list[Operation]:
    """The operations whose paths name an object, but those that people cannot call at all."""
    return [
        each
        for each in world.operations
        if each.route.path_parameters and not all(rights.is_machines(need) for need in each.route.needs)
    ]


async def ask(operation: Operation, client: Client, names: Names) -> Answer:
    """The operation on this object, with a body and query that it would take."""
    path, body = asked(operation, names)
    return await client.request(operation.method, path, body)


def expected(operation: Operation, kind: Resource, role: str) -> set[int]:
    """The statuses with which a stranger of this role may be answered."""
    if kind.kind == "public":
        return {200, 202}
    if not rights.suffices(role, operation.route.needs):
        return {403}
    if kind.kind in ("private", "account"):
        return {404}
    if kind.kind == "admin":
        return {*READABLE} if operation.method == "GET" else {403}
    if operation.method == "GET":
        return {403} if operation.label in kind.owners else {*READABLE}
    if operation.label in kind.open:
        return {*READABLE, 201, 422}
    return {403}


@on_the_loop_of_the_module
async def test_objects_of_others(world: World) -> None:
    """Conventions, object access: what a stranger of each role may do with an object of a member."""
    faults: list[str] = []
    strangers = {"member": world.stranger, "viewer": world.viewer, "auditor": world.auditor}
    made: dict[str, Names] = {}
    for operation in named(world):
        kind = of(operation)
        if kind.path not in made:
            made[kind.path] = await kind.make(world, world.owner)
        await world.settle()
        before = await tables.picture(world.kit)
        allowed = False
        for role, stranger in strangers.items():
            answer, wanted = await ask(operation, stranger, made[kind.path]), expected(operation, kind, role)
            allowed |= operation.method != "GET" and 200 <= answer.status < 300
            if answer.status not in wanted:
                faults.append(f"{operation.label} answers {answer} to a {role}, expected one of {sorted(wanted)}")
        if not allowed:
            faults += [
                f"{operation.label}: {change}" for change in tables.changed(before, await tables.picture(world.kit))
            ]
    assert not faults, "\n".join(faults)


@on_the_loop_of_the_module
async def test_objects_private_to_their_owner_are_absent_for_admins(world: World) -> None:
    """404 with the body of what is not there, so that nobody learns that it exists."""
    faults = []
    for operation in named(world):
        kind = of(operation)
        if kind.kind != "private":
            continue
        names = await kind.make(world, world.owner)
        nothing = {key: operation.samples.nothing(key) for key in names}
        for person in (world.admin, world.stranger):
            found, absent = [await ask(operation, person, each) for each in (names, nothing)]
            same = {"type", "title", "status", "detail", "code"}
            if found.status != 404 or any(found.json()[key] != absent.json()[key] for key in same):
                faults.append(f"{operation.label}: {found}, but {absent} for what is not there")
    assert not faults, "\n".join(faults)


async def test_objects_are_their_owners(make_world: Any) -> None:
    """The same requests by who may: not one is refused, so the refusals above are not for their form."""
    world: World = await make_world()  # whose plugins and breakers are changed
    faults: list[str] = []
    for operation in named(world):
        kind = of(operation)
        person = world.admin if kind.kind in ("managed", "admin") else world.owner
        answer = await ask(operation, person, await kind.make(world, person))
        if answer.status in (400, 401, 403, 404, 415, 422) or (answer.status >= 500 and answer.status != BEYOND):
            faults.append(f"{operation.label} answers {answer} to who may")
    assert not faults, "\n".join(faults)


@on_the_loop_of_the_module
async def test_objects_that_are_not_there(world: World) -> None:
    """404 `not_found` for everybody who holds the permission, whatever the verb."""
    faults: list[str] = []
    for operation in named(world):
        kind = of(operation)
        names = await kind.make(world, world.owner)
        last = operation.route.path_parameters[-1]
        absent = {**names, last: operation.samples.nothing(last)}
        if "{tool}" in operation.path or operation.path == "/files/{id}/content":  # a link is signed for its id
            continue
        answer = await ask(operation, world.admin, absent)
        code = "model_not_found" if operation.path.startswith("/llm/models/") else "not_found"
        if (answer.status, answer.code) != (404, code):
            faults.append(f"{operation.label} answers {answer} for what is not there")
    assert not faults, "\n".join(faults)


@on_the_loop_of_the_module
async def test_every_kind_of_object_is_served(world: World) -> None:
    """No factory is left of what is gone."""
    used = {of(operation).path for operation in world.operations if operation.route.path_parameters}
    assert {each.path for each in RESOURCES} - used == set()
