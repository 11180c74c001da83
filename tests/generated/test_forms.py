"""Addresses and methods: slash forms, `HEAD`, `OPTIONS`, other methods, overriding headers, crooked paths, hosts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import pytest_asyncio
from tests.generated.fixtures import PLUGINS
from tests.generated.operations import BASE, Operation
from tests.generated.resources import Names, asked, of
from tests.generated.world import CONFIG, World
from tests.shared_kernels import on_the_loop_of_the_module

from corral.testing.kit import Answer, Client, make_kernel

pytestmark = [pytest.mark.one_engine, on_the_loop_of_the_module]

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# What differs from one answer to the next, whatever is asked.
MOMENT = re.compile(rb'"[0-9a-f]{8}-[0-9a-f-]{27}"|"[0-9T:.-]{19,}Z"|"(instance|[a-z_]+_ms|ticket|at|next)":"?[^",]*')
OVERRIDES = ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override")


@pytest.fixture(scope="module")
def shared_database_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One engine: addresses and methods are none of the database's business."""
    return f"sqlite:///{tmp_path_factory.mktemp('forms')}/corral.db"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["table", "quart"])
async def world_both_ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A world whose requests are dispatched by the table of paths, and one where Quart dispatches them."""
    config = {**CONFIG, "server.fast_dispatch": request.param}
    async with make_kernel(tmp_path_factory.mktemp("both_ways"), config=config, plugins=PLUGINS) as kit:
        yield await World().build(kit)


async def names_of(world: World, made: dict[str, Names], operation: Operation) -> Names:
    if not operation.route.path_parameters:
        return {}
    kind = of(operation)
    if kind.path not in made:
        made[kind.path] = await kind.make(world, world.owner)
    return made[kind.path]


async def same(
    client: Client, method: str, paths: tuple[str, str], body: Any, **options: Any
) -> tuple[Answer, Answer, bool]:
    """The answers to two forms, and whether they are the same; of what changes by being read, the status is."""
    first, again, other = (
        await client.request(method, paths[0], body),
        await client.request(method, paths[0], body),
        await client.request(method, paths[1], body, **options),
    )
    whole = essence(first) == essence(again)
    return again, other, essence(again)[: 3 if whole else 2] == essence(other)[: 3 if whole else 2]


def essence(answer: Answer) -> tuple[int, str | None, bytes]:
    """What two answers to the same question have in common."""
    body = MOMENT.sub(b"", answer.body) if answer.headers.get("content-type", "").endswith("json") else b""
    return answer.status, answer.headers.get("content-type"), body


async def test_conventions_1_both_slash_forms_answer_the_same(world_both_ways: World) -> None:
    """Every operation, asked by an admin and by nobody; and no answer leads elsewhere."""
    world = world_both_ways
    made: dict[str, Names] = {}
    faults = []
    for operation in world.operations:
        names = await names_of(world, made, operation)
        if operation.path.endswith("/stream"):
            continue
        for client in (world.kit.client, *((world.admin,) if operation.method == "GET" else ())):
            path, body = asked(operation, names)
            path, _, query = path.partition("?")
            path = path.rstrip("/")  # GET / is /api/v1
            forms = (path, path + "/") if not query else (f"{path}?{query}", f"{path}/?{query}")
            plain, slashed, alike = await same(client, operation.method, forms, body)
            if not alike:
                faults.append(f"{operation.label}: {plain}, with a slash {slashed}")
            faults += [f"{operation.label} leads elsewhere" for each in (plain, slashed) if 300 <= each.status < 400]
    assert not faults, "\n".join(faults)


async def test_every_get_has_its_head(world_both_ways: World) -> None:
    """The status and headers of `GET`, without a body."""
    world = world_both_ways
    made: dict[str, Names] = {}
    faults = []
    for operation in world.operations:
        if operation.method != "GET" or operation.path.endswith("/stream"):
            continue
        path, _ = asked(operation, await names_of(world, made, operation))
        got, head = await world.admin.get(path), await world.admin.request("HEAD", path)
        same = ("content-type", "etag", "cache-control")
        if head.body or head.status != got.status or any(head.headers.get(key) != got.headers.get(key) for key in same):
            faults.append(f"HEAD {operation.path} answers {head}, GET {got}")
    assert not faults, "\n".join(faults)


async def test_options_and_other_methods_tell_what_is_allowed(world_both_ways: World) -> None:
    """`OPTIONS` 204 and every method that is not served 405, both with `Allow`; to anybody."""
    world = world_both_ways
    served: dict[str, set[str]] = {}
    example: dict[str, str] = {}
    for operation in world.operations:
        served.setdefault(operation.path, {"OPTIONS"}).add(operation.method)
        example[operation.path] = operation.at()
    faults = []
    for path, methods in served.items():
        methods |= {"HEAD"} if "GET" in methods else set()
        allow = ", ".join(sorted(methods))
        options = await world.kit.client.request("OPTIONS", example[path])
        if (options.status, options.headers.get("allow"), options.body) != (204, allow, b""):
            faults.append(f"OPTIONS {path}: {options} {options.headers.get('allow')}, not {allow}")
        for method in {*METHODS, "TRACE", "CONNECT", "PROPFIND", "get", "X" * 40} - methods:
            answer = await world.admin.request(method, example[path])
            if (answer.status, answer.code, answer.headers.get("allow")) != (405, "method_not_allowed", allow):
                faults.append(f"{method} {path}: {answer}")
    assert not faults, "\n".join(faults)


async def test_no_header_overrides_the_method(world_both_ways: World) -> None:
    """A `GET` stays a `GET`, whatever headers and parameters say."""
    world = world_both_ways
    made: dict[str, Names] = {}
    faults = []
    reads = [each for each in world.operations if each.method == "GET" and not each.path.endswith("/stream")]
    for operation in reads:
        path, _ = asked(operation, await names_of(world, made, operation))
        overriding = dict.fromkeys(OVERRIDES, "DELETE")
        plain, answer, alike = await same(world.admin, "GET", (path, path), None, headers=overriding)
        if not alike:
            faults.append(f"{operation.label}: {answer}, without the header {plain}")
    assert not faults, "\n".join(faults)


async def test_crooked_paths_are_nobodys(world_both_ways: World) -> None:
    """`//`, dots, encoded separators, backslashes, NUL: 404 for every operation, by whoever asks."""
    world = world_both_ways
    faults = []
    for operation in world.operations:
        path = operation.at()
        first, _, rest = path[1:].partition("/")
        forms = [
            f"/{first}//{rest}",
            f"//{first}/{rest}",
            f"/{first}/%2e/{rest}",
            f"/{first}/x/%2e%2e/{rest}",
            f"/{first}/../{first}/{rest}",
            f"/{first}/%2e%2e%2f{first}/{rest}",
            f"/{first}%00/{rest}",
            f"\\{first}\\{rest}",
            f"/{first}/%5c{rest}",
            f"{path}//",
        ]
        if not operation.route.rest and rest:
            forms.append(f"/{first}%2f{rest}")
        for form in forms:
            answer = await world.admin.request(operation.method, f"{BASE}{form}")
            if (answer.status, answer.code) != (404, "not_found"):
                faults.append(f"{operation.method} {form}: {answer}")
    assert not faults, "\n".join(faults)


async def test_ids_are_ids(world: World) -> None:
    """In the place of an id: upper case is the same id, anything else is 404."""
    faults = []
    made: dict[str, Names] = {}
    for operation in world.operations:
        ids = [name for name in operation.route.path_parameters if name == "id" or name.endswith("_id")]
        if not ids:
            continue
        names = await names_of(world, made, operation)
        if operation.method == "GET":
            path, _ = asked(operation, names)
            upper, _ = asked(operation, {**names, **{key: names[key].upper() for key in ids}})
            plain, shouted = await world.admin.get(path), await world.admin.get(upper)
            if essence(plain) != essence(shouted):
                faults.append(f"{operation.label}: {plain}, in upper case {shouted}")
        for key in ids:
            for text in (
                "x",
                "0",
                "-1",
                "%20",
                "1e3",
                names[key][:-1],
                names[key] + "0",
                names[key].replace("-", ""),
                "{" + names[key] + "}",
                "null",
                "%00",
                "%F0%9F%98%80",
            ):
                answer = await world.admin.request(operation.method, operation.at({**names, key: text}), {})
                if answer.status == 405:  # the word of another operation
                    continue
                if (answer.status, answer.code) != (404, "not_found"):
                    faults.append(f"{operation.label} with {text}: {answer}")
    assert not faults, "\n".join(faults)


async def test_t7_hosts(world: World) -> None:
    """`Host`: the own names and addresses everywhere, any other 400; health and metrics answer every host."""
    faults = []
    for operation in world.operations:
        for host in ("evil.example", "localhost.evil.example", "user@localhost", "", "localhost:8000:1", "a b"):
            answer = await world.admin.request(operation.method, operation.at(), headers={"host": host})
            if operation.route.exempt_host:
                if answer.status == 400:
                    faults.append(f"{operation.label} refuses the host {host!r}")
            elif (answer.status, answer.code) != (400, "invalid_host"):
                faults.append(f"{operation.label} with host {host!r}: {answer}")
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "192.0.2.7"):
            answer = await world.kit.client.request(operation.method, operation.at(), headers={"host": host})
            if answer.code == "invalid_host":
                faults.append(f"{operation.label} refuses {host}")
    assert not faults, "\n".join(faults)


async def test_no_answer_repeats_a_forged_host(world: World) -> None:
    """Links are relative or built of the configured address, never of what the request says of itself."""
    viewer = await world.kit.as_user("viewer")  # who signs out here
    names = ("forwarded-host", "forwarded-server", "forwarded-prefix", "original-url", "rewrite-url", "host")
    forged = {"forwarded": "host=evil.example", **{f"x-{name}": "evil.example" for name in names}}
    faults = []
    made: dict[str, Names] = {}
    for operation in world.operations:
        if operation.path.endswith("/stream") or operation.method == "DELETE":
            continue
        path, body = asked(operation, await names_of(world, made, operation))
        answer = await viewer.request(operation.method, path, body, headers=forged)
        if b"evil.example" in answer.body or "evil.example" in json.dumps(answer.headers):
            faults.append(f"{operation.label}: {answer}")
    assert not faults, "\n".join(faults)


async def test_every_answer_has_the_headers_of_the_contract(world: World) -> None:
    """`X-Request-ID`, `nosniff`, a policy, a rule for caches; problem documents for failures."""
    viewer = await world.kit.as_user("viewer")  # who signs out here
    faults = []
    for operation in world.operations:
        for client in (world.kit.client, viewer):
            if operation.path.endswith("/stream") and client is viewer:
                continue
            answer = await _answer(client, operation)
            headers = (
                "x-request-id",
                "x-content-type-options",
                "referrer-policy",
                "content-security-policy",
                "cache-control",
            )
            faults += [f"{operation.label} {answer.status}: no {key}" for key in headers if key not in answer.headers]
            if answer.status >= 400 and answer.code is None and answer.status != 503:
                faults.append(f"{operation.label}: {answer} is no problem document")
    assert not faults, "\n".join(faults)


async def _answer(client: Client, operation: Operation) -> Answer:
    return await client.request(operation.method, operation.at() + operation.sample_query(), operation.sample_body())
