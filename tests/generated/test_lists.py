"""Lists, counts, searches and events show what a read by id shows, and each list can be walked to its end.

Conventions, done when 5 and 6, over every list of whatever plugins are active. On PostgreSQL, the short form asks what
the statements of lists and searches decide: a read by id is one condition, the same on both engines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.generated import rights
from tests.generated.operations import Operation
from tests.generated.resources import RESOURCES, Names, asked, of
from tests.generated.world import World
from tests.plugins.realtime.conftest import ear, settle
from tests.shared_kernels import on_the_loop_of_the_module

from corral.testing.kit import Client
from corral.testing.server import serving

PEOPLE = ("member", "viewer", "auditor", "admin")
MADE = 3  # of each kind
PAGES = 40  # of the walk through a long list


def person(world: World, role: str) -> Client:
    return {"member": world.stranger, "viewer": world.viewer, "auditor": world.auditor, "admin": world.admin}[role]


def lists(world: World) -> list[Operation]:
    """The reads without an object in their path that answer a page."""
    return [
        each
        for each in world.operations
        if each.method == "GET" and not each.route.path_parameters and {"limit", "cursor"} <= {*each.query_names}
    ]


def is_whole(world: World, *, long_form: bool) -> bool:
    return long_form or world.kit.kernel.database.kind == "sqlite"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(world: World) -> dict[str, list[Names]]:
    """What the tests of this module find. They read it only, or add to it."""
    return await furnished(world)


async def furnished(world: World) -> dict[str, list[Names]]:
    """Objects of the owner, some of each kind, by the path that names them."""
    made = {kind.path: [await kind.make(world, world.owner) for _ in range(MADE)] for kind in RESOURCES}
    await world.settle()
    return made


def private_ids(made: dict[str, list[Names]]) -> set[str]:
    """The ids that nobody but the owner may meet."""
    return {
        names[key]
        for kind in RESOURCES
        if kind.kind in ("private", "account") and kind.path.endswith("{id}")
        for names in made[kind.path]
        for key in ("id",)
    }


async def pages(client: Client, path: str, limit: int) -> AsyncIterator[dict[str, Any]]:
    """Every page of a list, by `next`."""
    mark = "&" if "?" in path else "?"
    cursor = ""
    while True:
        answer = await client.get(f"{path}{mark}limit={limit}{cursor}")
        assert answer.status == 200, f"{path}: {answer}"
        page = answer.json()
        yield page
        if page["next"] is None:
            return
        cursor = f"&cursor={page['next']}"


@pytest.mark.usefixtures("made")
@on_the_loop_of_the_module
async def test_conventions_6_what_a_list_shows_a_read_by_id_shows(world: World, long_form: bool) -> None:
    """For people of every role; `total` counts what they can see, no more."""
    faults = []
    count = 20 if is_whole(world, long_form=long_form) else 3
    reads = {each.path: each for each in world.operations if each.method == "GET"}
    for operation in lists(world):
        for role in PEOPLE:
            if not rights.suffices(role, operation.route.needs):
                continue
            client, items, totals = person(world, role), [], []
            async for page in pages(client, operation.path + operation.sample_query(), 50):
                items += page["items"]
                totals.append(page["total"])
            if totals[0] not in (None, len(items)):  # the first: reading the audit log is written into it
                faults.append(f"{operation.label} counts {totals} for the {role} and shows {len(items)}")
            read = next(
                (reads[path] for path in (f"{operation.path}/{{{key}}}" for key in ("id", "name")) if path in reads),
                None,
            )
            if read is None or not rights.suffices(role, read.route.needs):
                continue
            key = read.route.path_parameters[0]
            for item in items[:count]:
                answer = await client.get(read.at({key: str(item[key])}))
                if answer.status != 200:
                    faults.append(f"{operation.label} shows {item[key]} to the {role}, {read.label} answers {answer}")
    assert not faults, "\n".join(faults)


@on_the_loop_of_the_module
async def test_conventions_6_nothing_private_is_met_anywhere(
    world: World, made: dict[str, list[Names]], long_form: bool
) -> None:
    """No read of a stranger, whatever its filters, tells the id of an object that is private to somebody else."""
    whole = is_whole(world, long_form=long_form)
    secret = private_ids(made)
    searched = private_ids({path: names[:1] for path, names in made.items()})
    assert searched
    faults = []
    for operation in world.operations:
        if (
            operation.method != "GET"
            or operation.path.endswith("/stream")
            or (operation.route.path_parameters and not whole)
        ):
            continue
        kind = of(operation) if operation.route.path_parameters else None
        for names in made[kind.path][:1] if kind is not None else [{}]:
            path, _ = asked(operation, names)
            mark = "&" if "?" in path else "?"
            searches = [
                f"{mark}{key}={each}"
                for key in ("search", "q", "object_id")
                for each in sorted(searched)
                if key in operation.query_names
            ]
            for role in ("member", "viewer") if whole else ("member",):
                for query in ("", *searches):
                    answer = await person(world, role).get(path + query)
                    told = {
                        each for each in secret if each in answer.body.decode("utf-8", "replace") and each not in path
                    }
                    told -= {each for each in told if each in query}
                    if told:
                        faults.append(f"{operation.label}{query} tells a {role} of {told}")
    assert not faults, "\n".join(faults)


async def test_conventions_6_sockets_and_the_log_tell_what_a_read_would(make_world: Any) -> None:
    """A stranger follows everything while objects of every kind are made: each told object can be read by id."""
    world: World = await make_world()
    reads = {each.path: each for each in world.operations if each.method == "GET"}
    heard: list[dict[str, Any]] = []
    async with serving(world.kit) as port, ear(port, world.stranger) as one:
        await one.ask("subscribe", event="*")
        made = await furnished(world)
        await settle(world.kit)
        await one.say("ping")
        while (frame := await one.hear(10))["type"] != "pong":
            heard.append(frame)
    page = (await world.stranger.get("/events?limit=200")).json()
    text = json.dumps([heard, page])
    assert len(heard) > 10
    assert not {each for each in private_ids(made) if each in text}
    faults = []
    for event in [frame for frame in heard if frame["type"] == "event"] + page["items"]:
        about = event.get("object") or {}
        read = reads.get(f"/{about.get('type')}s/{{id}}")
        if read is None or event["event"].endswith((".deleted", ".removed")):
            continue
        answer = await world.stranger.get(read.at({"id": about["id"]}))
        if answer.status != 200:
            faults.append(f"{event['event']} tells of {about}, {read.label} answers {answer}")
    assert not faults, "\n".join(faults)


@pytest.mark.usefixtures("made")
@on_the_loop_of_the_module
async def test_conventions_5_every_list_is_walked_once_while_others_are_added(world: World) -> None:
    """Following `next` from the first page visits each row that was there once, and none twice."""
    faults = []
    for operation in lists(world):
        path = operation.path + operation.sample_query()
        client = world.admin if rights.suffices("admin", operation.route.needs) else world.owner
        if operation.path == "/events":  # its `next` is the place to go on from, always
            continue
        there = [_key(item) async for page in pages(client, path, 200) for item in page["items"]]
        kind = next((each for each in RESOURCES if each.path.rpartition("/")[0] == operation.path), None)
        walked: list[str] = []
        async for page in pages(client, path, max(2, len(there) // PAGES)):
            walked += [_key(item) for item in page["items"]]
            if kind is not None and len(walked) <= 6:
                await kind.make(world, world.owner)
            if page["offset"] not in (0, None) or len(walked) > len(there) + 100:
                faults.append(f"{operation.label} gives {page['offset']} as its offset, or has no end")
                break
        seen, wanted = Counter(walked), Counter(there)
        twice = {each for each in seen if seen[each] > max(1, wanted[each])}
        if twice or wanted - seen:
            faults.append(f"{operation.label}: twice {twice}, missed {wanted - seen} of {len(there)}")
    assert not faults, "\n".join(faults)


def _key(item: dict[str, Any]) -> str:
    return json.dumps(item.get("id") or item.get("seq") or item.get("name") or item, sort_keys=True)


# Lists of another form, as their pages say: logs that are read on from a place, breakdowns, what a worker may claim.
OTHER_FORMS = {
    "GET /events",
    "GET /tasks/{id}/logs",
    "GET /cost/by-model",
    "GET /cost/by-task",
    "GET /cost/by-user",
    "GET /cost/by-workflow",
    "GET /workers/{id}/tasks",
    "GET /workflow-runs/{id}/events",
}


@pytest.mark.one_engine
@on_the_loop_of_the_module
async def test_every_list_takes_limit_offset_and_cursor(world: World) -> None:
    """Whatever answers `items` with `next` and `total` is a list: its query is that of every list."""
    faults = []
    for operation in world.operations:
        answered = operation.spec["responses"].get("200", {}).get("content", {}).get("application/json", {})
        schema = operation.samples.resolved(answered.get("schema", {}))
        is_list = {"items", "next", "total", "limit"} <= schema.get("properties", {}).keys()
        if is_list and operation.label not in OTHER_FORMS:
            missing = {"limit", "offset", "cursor"} - {*operation.query_names}
            faults += [f"{operation.label} takes no {sorted(missing)}"] if missing else []
    assert not faults, "\n".join(faults)


@pytest.mark.one_engine
@pytest.mark.usefixtures("made")
@on_the_loop_of_the_module
async def test_places_that_a_list_does_not_have_are_422(world: World) -> None:
    """`limit` and `offset` out of bounds, altered and foreign cursors, a cursor with an offset: never clamped."""
    faults = []
    for operation in lists(world):
        client = world.admin
        mark = "&" if operation.sample_query() else "?"
        path = operation.path + operation.sample_query() + mark
        wrong = ["limit=0", "limit=201", "limit=-1", "limit=x", "limit=1.5", "limit=", "cursor=x", "cursor="]
        wrong += ["offset=-1", "offset=1000001", "offset=x"] if "offset" in operation.query_names else []
        found = (await client.get(f"{path}limit=1")).json()
        if found["next"] is not None and operation.path != "/events":
            cursor = found["next"]
            wrong += [
                f"cursor={cursor}&offset=0",
                f"cursor={cursor[:-2]}",
                f"cursor={'CB'[cursor[0] == 'C']}{cursor[1:]}",
            ]
            if rights.suffices("viewer", operation.route.needs):
                foreign = await world.viewer.get(f"{path}limit=1&cursor={cursor}")
                if foreign.code != "invalid_cursor":
                    faults.append(f"{operation.label} takes the cursor of somebody else: {foreign}")
        for query in wrong:
            answer = await client.get(path + query)
            if answer.status != operation.invalid_status or answer.code not in ("validation_error", "invalid_cursor"):
                faults.append(f"{operation.label}?{query}: {answer}")
    assert not faults, "\n".join(faults)
