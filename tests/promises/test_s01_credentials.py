"""S1: every operation of whatever plugins are active x every kind of bad or insufficient credential: refused as
specified, with no effect on any row.

What is expected comes from the HTTP contract (`tests/generated/rights.py`), not from the code under test. The body that
is sent is a good one, so that an operation that forgot to ask would have its effect.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.generated import rights, tables
from tests.generated.callers import Caller, Refusal, bad, insufficient
from tests.generated.operations import Operation
from tests.generated.world import World

from corral.testing.kit import Answer

pytestmark = pytest.mark.one_engine


async def ask(world: World, operation: Operation, caller: Caller) -> Answer:
    """The operation with this credential."""
    path = operation.at() + (caller.query or operation.sample_query())
    return await world.kit.client.request(operation.method, path, operation.sample_body(), headers=caller.headers)


def fault(operation: Operation, caller: Caller, expected: Refusal, answer: Answer) -> str | None:
    """What is wrong with a refusal."""
    if expected != (answer.status, answer.code):
        return f"{operation.label} answers {answer.status} {answer.code} to {caller.name}, not {expected}"
    if answer.status == 401 and not answer.headers.get("www-authenticate", "").startswith("Bearer"):
        return f"{operation.label} names no scheme in its 401 to {caller.name}"
    if answer.json().get("request_id") != answer.headers["x-request-id"]:
        return f"{operation.label} gives {caller.name} no request_id"
    if not operation.documents(answer.status):
        return f"{operation.label} does not tell in the document that it may answer {answer.status}"
    return None


async def matrix(world: World, callers: list[Caller]) -> tuple[list[str], int]:
    """Every caller at every operation that must refuse them: faults, and how many were asked."""
    faults, asked = [], 0
    await world.settle()
    for caller in callers:
        before = await tables.picture(world.kit)
        labels = []
        for operation in world.operations:
            expected = None if operation.is_public else caller.refusal(operation.route)
            if expected is None:
                continue
            found = fault(operation, caller, expected, await ask(world, operation, caller))
            faults += [found] if found else []
            labels.append(operation.label)
        asked += len(labels)
        changes = tables.changed(before, await tables.picture(world.kit))
        faults += [f"{caller.name} changed {change}" for change in changes]
    return faults, asked


async def test_s1_what_is_no_credential_opens_nothing_and_changes_nothing(make_world: Any, figure: Any) -> None:
    world: World = await make_world()
    callers = await bad(world)
    faults, asked = await matrix(world, callers)
    figure(
        "S1 credentials",
        {"kinds": len(callers), "operations": len(world.operations), "requests": asked, "exceptions": len(faults)},
    )
    assert not faults, "\n".join(faults)
    assert asked > 30 * sum(not operation.is_public for operation in world.operations)


async def test_s1_a_credential_that_does_not_suffice_opens_nothing_and_changes_nothing(
    make_world: Any, figure: Any
) -> None:
    world: World = await make_world()
    callers = await insufficient(world)
    faults, asked = await matrix(world, callers)
    figure(
        "S1 rights",
        {"kinds": len(callers), "operations": len(world.operations), "requests": asked, "exceptions": len(faults)},
    )
    assert not faults, "\n".join(faults)
    for caller in callers:
        assert any(caller.refusal(operation.route) for operation in world.operations), f"nothing refuses {caller.name}"


async def test_s1_public_operations_look_at_no_credential(make_world: Any) -> None:
    """They answer a bad one as they answer nobody, so that nothing is learned from it.

    Except signing out, which takes the token of a session that has ended (`tests/kernel/auth/test_sign_out.py`).
    """
    world: World = await make_world()
    callers, faults = await bad(world), []
    for operation in [each for each in world.operations if each.is_public and each.path != "/auth/logout"]:
        path = operation.at()
        nobody = await world.kit.client.request(operation.method, path)
        for caller in callers:
            if caller.query or caller.name.startswith("the token in"):
                continue
            answer = await world.kit.client.request(operation.method, path, headers=caller.headers)
            if (answer.status, answer.code) != (nobody.status, nobody.code):
                faults.append(f"{operation.label}: {answer} to {caller.name}, {nobody} to nobody")
    assert not faults, "\n".join(faults)


async def test_s1_who_may_read_is_not_refused(make_world: Any) -> None:
    """The other side of the table: people get in where their role holds a permission."""
    world: World = await make_world()
    faults = []
    for role in rights.ROLES:
        person = {"admin": world.admin, "member": world.owner, "viewer": world.viewer, "auditor": world.auditor}[role]
        for operation in world.operations:
            if operation.method != "GET" or operation.is_public or operation.route.step_up:
                continue
            if (
                operation.path.endswith("/stream")
                or "{" in operation.path
                or not rights.suffices(role, operation.route.needs)
            ):
                continue
            if operation.path.endswith("/stream"):
                continue
            answer = await person.get(operation.path + operation.sample_query())
            if answer.status in (401, 403) or answer.status >= 500:
                faults.append(f"{operation.label} answers {answer.status} {answer.code} to the {role}")
    assert not faults, "\n".join(faults)
