"""What every operation that takes a body, and every query, does with what is not one: T1 to T6 of the hardening table,
fields that belong to the server, fields that nobody knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.generated import tables
from tests.generated.operations import Operation
from tests.generated.resources import Names, asked, of
from tests.generated.world import World
from tests.shared_kernels import on_the_loop_of_the_module

from corral.ids import new_id
from corral.testing.kit import Answer, Client

pytestmark = [pytest.mark.one_engine, on_the_loop_of_the_module]

# Set by the server unless the operation's own table says otherwise: then the document has the field.
SERVERS = {
    "id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "role": "admin",
    "owner_id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "created_by": "01890a5d-ac96-774b-bcce-b302099a8057",
    "status": "completed",
    "is_active": True,
    "version": 7,
    "created_at": "2020-01-01T00:00:00Z",
    "updated_at": "2020-01-01T00:00:00Z",
    "is_admin": True,
    "permissions": ["*"],
}
FORMS = {
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"1",
    "null": b"null",
}
MALFORMED = {
    "half": b'{"a":',
    "two values": b"{} {}",
    "a name twice": b'{"a":1,"a":2}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "bad UTF-8": b'{"a":"\xff\xfe"}',
    "a surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "deep lists": b"[" * 100_000,
    "a deep body": b'{"a":' * 65 + b"1" + b"}" * 65,
    "a comment": b"{/**/}",
    "a single quote": b"{'a':1}",
    "control characters": b'{"a":"\x01"}',
}
UNSTORABLE = {
    "a lone surrogate": b'"\\ud800"',
    "NUL": b'"\\u0000"',
    "beyond 64 bits": b"9223372036854775808",
    "below 64 bits": b"-9223372036854775809",
    "a huge exponent": b"1e400",
}


# What was spent for something outlives it: a correction names what may be gone.
LEDGERS = {"POST /cost/events"}


def writing(world: World) -> Iterator[tuple[Operation, Client]]:
    """Every operation with a body, and a caller who may call it."""
    for operation in world.operations:
        if operation.body_schema is not None:
            caller = caller_of(world, operation)
            if caller is not None:
                yield operation, caller


def caller_of(world: World, operation: Operation) -> Client | None:
    """Whom the operation does not refuse before it looks at the body."""
    if operation.is_public:
        return world.kit.client
    if all(need.endswith((".act", ".report")) for need in operation.route.needs):
        return world.worker
    return world.admin


async def send(operation: Operation, client: Client, content: bytes, names: Names, **headers: str) -> Answer:
    path, _ = asked(operation, names)
    sent = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    return await client.request(operation.method, path, content=content, headers=sent)


def with_field(operation: Operation, names: Names, field: str, value: bytes) -> bytes:
    """The least body with one more field, whose value is given as JSON."""
    body = json.dumps(asked(operation, names)[1] or {})
    return body[:-1].encode() + (b"," if len(body) > 2 else b"") + json.dumps(field).encode() + b":" + value + b"}"


async def made_for(world: World, made: dict[str, Names], operation: Operation) -> Names:
    if not operation.route.path_parameters:
        return {}
    kind = of(operation)
    if kind.path not in made:
        made[kind.path] = await kind.make(world, world.owner)
    return made[kind.path]


async def test_t1_to_t4_bodies_that_are_none(world: World) -> None:
    """Not JSON 400, too much 413, of another type 415; with a pointer-less problem document and without an effect."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    asked_for = [(each, client, await made_for(world, made, each)) for each, client in writing(world)]
    await world.settle()
    before = await tables.picture(world.kit)
    for operation, client, names in asked_for:
        for what, content in MALFORMED.items():
            answer = await send(operation, client, content, names)
            if what == "a surrogate in UTF-8" and operation.route.lenient:
                continue
            if (answer.status, answer.code) != (400, "malformed_json"):
                faults.append(f"{operation.label} answers {answer} to {what}")
        for media in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "application/xml",
            "",
            "application/json; charset=utf-16",
            "application/jsonp",
            "text/json",
        ):
            if operation.takes_any_json and media == "application/x-www-form-urlencoded":
                continue
            answer = await send(operation, client, b'{"a":1}', names, **{"content-type": media})
            if (answer.status, answer.code) != (415, "unsupported_media_type"):
                faults.append(f"{operation.label} answers {answer} to {media!r}")
        answer = await send(operation, client, b"{}", names, **{"content-encoding": "gzip"})
        if answer.code != "unsupported_media_type":
            faults.append(f"{operation.label} answers {answer} to gzip")
        limit = operation.route.body_limit
        for content, length in ((b"{}", 10 * 2**30), (b" " * (limit + 1), limit + 1)):
            answer = await send(operation, client, content, names, **{"content-length": str(length)})
            if (answer.status, answer.code) != (413, "payload_too_large"):
                faults.append(f"{operation.label} answers {answer.status} {answer.code} to {length} bytes")
    changes = tables.changed(before, await tables.picture(world.kit))
    assert not faults + changes, "\n".join(faults + changes)


async def test_t5_t6_values_that_cannot_be_stored(world: World) -> None:
    """Surrogates, NUL and integers beyond 64 bits are 422 at their place; the text of machines is cleaned."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    for operation, client in writing(world):
        names = await made_for(world, made, operation)
        least = asked(operation, names)[1] or {}
        for field in ("unknown", *sorted(_fields(operation) - {*SERVERS, *least})[:12]):
            for what, value in UNSTORABLE.items():
                answer = await send(operation, client, with_field(operation, names, field, value), names)
                cleaned = operation.route.lenient and answer.status < 500
                if answer.status not in (400, 422) and not cleaned:
                    faults.append(f"{operation.label} answers {answer} to {what} as {field}")
    assert not faults, "\n".join(faults)


async def test_bodies_of_another_form(world: World) -> None:
    """A list, a text, a number, null: 422."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    for operation, client in writing(world):
        if operation.takes_any_json:
            continue
        names = await made_for(world, made, operation)
        for what, content in FORMS.items():
            answer = await send(operation, client, content, names)
            if (answer.status, answer.code) != (operation.invalid_status, "validation_error"):
                faults.append(f"{operation.label} answers {answer} to {what}")
    assert not faults, "\n".join(faults)


async def test_fields_that_belong_to_the_server_are_unknown(world: World) -> None:
    """In every body, at the first level and in every object below: `role`, `owner_id`, `version`, timestamps."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    for operation, client in writing(world):
        if operation.takes_any_json:
            continue
        names = await made_for(world, made, operation)
        fields = _fields(operation)
        for field, value in [*SERVERS.items(), ("surely_unknown", 1)]:
            if field in fields:
                continue
            content = with_field(operation, names, field, json.dumps(value).encode())
            answer = await send(operation, client, content, names)
            told = (
                {(fault["pointer"], fault["code"]) for fault in answer.json().get("errors", ())} if answer.code else ()
            )
            if answer.status != operation.invalid_status or not any(pointer.endswith(field) for pointer, _ in told):
                faults.append(f"{operation.label} answers {answer} to the field {field}")
    assert not faults, "\n".join(faults)


def _fields(operation: Operation) -> set[str]:
    """The fields that the operation's table makes writable."""
    schema = operation.samples.resolved(operation.body_schema or {})
    options = [operation.samples.resolved(each) for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    if schema.get("additionalProperties") not in (False, None):
        return {*SERVERS, "surely_unknown"}  # a map: whatever its keys are
    return {name for each in (schema, *options) for name in each.get("properties", {})}


async def test_parameters_that_nobody_knows_are_422(world: World) -> None:
    """On every operation, with a pointer; and one that may come once does not come twice."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    for operation in world.operations:
        client = caller_of(world, operation)
        if client is None or operation.path.endswith("/stream") or operation.route.form:
            continue
        path, body = asked(operation, await made_for(world, made, operation))
        mark = "&" if "?" in path else "?"
        for unknown in ("surely_unknown=1", "limit[]=1", "%00=1", "access_token=x", "_method=DELETE"):
            answer = await client.request(operation.method, f"{path}{mark}{unknown}", body)
            pointers = [fault["pointer"] for fault in answer.json().get("errors", ())] if answer.code else []
            if answer.status != operation.invalid_status or not all(
                pointer.startswith("/query/") for pointer in pointers
            ):
                faults.append(f"{operation.label} answers {answer} to ?{unknown}")
        answer = await client.request(operation.method, operation.at() + "?" + "&".join(f"a{n}=1" for n in range(101)))
        if answer.status not in (400, 422):
            faults.append(f"{operation.label} answers {answer} to 101 parameters")
        answer = await client.request(operation.method, operation.at() + "?" + "a" * 9000)
        if answer.status != 414:
            faults.append(f"{operation.label} answers {answer} to a long address")
        answer = await client.request(operation.method, operation.at(), headers={"x-long": "a" * 17_000})
        if answer.status != 431:
            faults.append(f"{operation.label} answers {answer} to long headers")
    assert not faults, "\n".join(faults)


async def test_references_that_name_nothing_are_422_at_their_place(world: World) -> None:
    """An id in a body that nothing visible has: `unknown_reference` or, for what the path is about, 404."""
    faults: list[str] = []
    made: dict[str, Names] = {}
    for operation, client in writing(world):
        schema = operation.samples.resolved(operation.body_schema or {})
        references = [name for name in schema.get("properties", {}) if name.endswith("_id") and name != "lease_id"]
        if operation.label in LEDGERS:
            continue
        names = await made_for(world, made, operation)
        for field in references:
            content = with_field(operation, names, field, json.dumps(new_id()).encode())
            if json.dumps(field) in json.dumps(asked(operation, names)[1] or {}):
                continue
            answer = await send(operation, client, content, names)
            if answer.status < 400 or answer.status >= 500:
                faults.append(f"{operation.label} answers {answer} to an unknown {field}")
    assert not faults, "\n".join(faults)
