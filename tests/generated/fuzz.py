"""Requests that schemathesis makes out of the OpenAPI document, sent to the running kernel by callers of every kind.

What a request makes is asked for by later ones, deleted things too; ids of what exists take the place of made-up ones.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
import requests
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.transport import Response
from schemathesis.specs.openapi import checks
from tests.generated.cases import Cases
from tests.generated.operations import BASE, Operation
from tests.generated.resources import RESOURCES, Names, of
from tests.generated.world import World

from corral.testing.kit import PASSWORD, Answer, Client
from corral.testing.stub_servers import FakeResolver

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
# What these do to the installation ends what the others do: they come last.
LAST = ("/admin/kill-switch", "/plugins/", "/security", "/settings", "/auth/change-password", "/auth/logout")
# A breaker that guards something is there without being created; deleting it discards what an admin has set. An
# installation stays on record as removed.
STAYS_READABLE = ("DELETE /circuit-breakers/{name}", "DELETE /marketplace/installations/{id}")
KEPT = 30  # of each kind of object
OLD = 0.85  # of ids are those of something that is or was there

T = TypeVar("T")


class Sent(msgspec.Struct, frozen=True):
    """A fault, with the request that showed it."""

    fault: str
    request: str


class Fuzz:
    """`faults` by what they are and where, each with its first request; `count` of requests by status."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.faults: dict[tuple[str, str], Sent] = {}
        self.count: Counter[int] = Counter()
        self.pool: dict[str, list[Names]] = {}
        self.callers: dict[str, Client] = {}
        self._loop = asyncio.get_running_loop()

    async def prepare(self) -> None:
        """Objects of every kind, and who asks for them."""
        world = self.world
        world.kit.kernel.egress.resolve = FakeResolver({})
        for kind in RESOURCES:
            self.pool[kind.path] = [await kind.make(world, owner) for owner in (world.owner, world.admin)]
        claim = await world.lease(world.owner, "fuzzed")
        self.pool["/tasks/{id}"].append({"id": claim["task"]["id"]})
        self.callers = {
            "admin": world.admin,
            "owner": world.owner,
            "stranger": world.stranger,
            "viewer": world.viewer,
            "worker": world.worker,
            "attempt": world.client(claim["agent_token"]),
            "nobody": world.kit.client,
        }

    async def run(self, cases: int, *, derandomize: bool) -> None:
        """So many cases of every operation, half of them wrong on purpose; each is asked by two callers."""
        document = _plain((await self.world.kit.client.get("/openapi.json")).json())
        schema, made = schemathesis.openapi.from_dict(document), Cases(document, derandomize=derandomize)
        operations = [each for each in self.world.operations if not each.path.endswith("/stream")]
        for operation in sorted(operations, key=lambda each: each.path.startswith(LAST)):
            described = schema[(BASE + operation.path).removesuffix("/")][operation.method]
            await asyncio.to_thread(self._operation, operation, described, made, cases)

    # -- in a thread beside the loop of the kernel

    def _operation(self, operation: Operation, described: Any, made: Cases, count: int) -> None:
        if operation.route.path_parameters:
            self._ask_for_nothing(operation)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for case in made.of(described, mode, count):
                self._case(operation, case)

    def _case(self, operation: Operation, case: Case[Any]) -> None:
        self._use_what_exists(operation, case)
        _do_not_wait(case)
        for name in self._who(operation):
            prepared = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
            answer = self._send(prepared, name)
            if answer.status == 401 and self.callers[name].user.get("email"):
                self._sign_in(name)
                answer = self._send(prepared, name)
            self.count[answer.status] += 1
            self._judge(operation, case, prepared, answer, name)
            self._remember(operation, case, answer)

    def _ask_for_nothing(self, operation: Operation) -> None:
        """Ask for an object that never existed, which generated ids reach only by chance: it is not found."""
        name = self._who(operation)[0]
        path = operation.at() + operation.sample_query()
        answer = self._ask(self.callers[name].request(operation.method, path, operation.sample_body()))
        self.count[answer.status] += 1
        if not 400 <= answer.status < 500:
            self._fault(operation.label, f"an object that never existed: {answer}", f"{path} by {name}")

    def _who(self, operation: Operation) -> list[str]:
        """Somebody who may, mostly, and somebody else."""
        machines = all(need.endswith((".act", ".report")) for need in operation.route.needs)
        first = "attempt" if machines and self.random.random() < 0.7 else "worker" if machines else "admin"
        return [first, self.random.choice([*self.callers])]

    def _use_what_exists(self, operation: Operation, case: Case[Any]) -> None:
        if (
            operation.route.path_parameters
            and not _is_wrong(case, ParameterLocation.PATH)
            and self.random.random() < OLD
        ):
            names = self.random.choice(self.pool[of(operation).path])
            case.path_parameters.update({key: names[key] for key in operation.route.path_parameters if key in names})
        if isinstance(case.body, dict):
            for key in [key for key in case.body if key.endswith("_id")]:
                known = self.pool.get(f"/{key[:-3]}s/{{id}}")
                if known and self.random.random() < OLD:
                    case.body[key] = self.random.choice(known)["id"]

    def _send(self, prepared: requests.PreparedRequest, name: str) -> Answer:
        headers = {_text(key): _text(value) for key, value in prepared.headers.items()}
        body = prepared.body if prepared.body is not None else b""
        assert isinstance(body, bytes | str)
        content = body if isinstance(body, bytes) else body.encode()
        client = self.callers[name]
        asked = client.request(prepared.method or "", prepared.path_url, headers=headers, content=content, root=True)
        return self._ask(asked)

    def _sign_in(self, name: str) -> None:
        async def again() -> Client:
            client = self.callers[name]
            body = {"email": client.user["email"], "password": PASSWORD}
            answer = await self.world.kit.client.post("/auth/login", body)
            token = answer.json().get("access_token") if answer.status == 200 else None
            return Client(client.app, token or client.token, client.user)

        self.callers[name] = self._ask(again())

    def _judge(
        self, operation: Operation, case: Case[Any], prepared: requests.PreparedRequest, answer: Answer, name: str
    ) -> None:
        headers = {key: [value] for key, value in answer.headers.items()}
        response = Response(answer.status, headers, answer.body, prepared, 0.01, False, encoding="utf-8")
        faults = []
        if answer.status == 500:
            faults.append(f"a server error: {answer}")
        if answer.code is not None and answer.json()["request_id"] != answer.headers["x-request-id"]:
            faults.append("no request_id")
        if name == "nobody" and not operation.is_public and answer.status < 400:
            faults.append("ignored authentication")
        try:
            taken = answer.status < 400 and _is_wrong(case, ParameterLocation.BODY, ParameterLocation.QUERY)
            case.validate_response(response, checks=CHECKS if taken else CHECKS[:-1])
        except FailureGroup as group:
            faults += [_told(each) for each in group.exceptions]
        for fault in faults:
            sent = f"{prepared.method} {prepared.path_url} by {name}: {prepared.body!r}"
            self._fault(operation.label, fault, sent[:600])

    def _fault(self, label: str, fault: str, request: str) -> None:
        self.faults.setdefault((label, fault.partition("\n")[0][:80]), Sent(fault, request))

    def _remember(self, operation: Operation, case: Case[Any], answer: Answer) -> None:
        if answer.status == 201 and "/" + "{id}" not in operation.path:
            made = self.pool.get(operation.path + "/{id}")
            identifier = answer.json().get("id")
            if made is not None and identifier:
                made.append({"id": identifier})
                del made[: max(0, len(made) - KEPT)]
        if operation.method == "DELETE" and answer.status < 300 and operation.label not in STAYS_READABLE:
            self._is_gone(operation, case)

    def _is_gone(self, operation: Operation, case: Case[Any]) -> None:
        """What was deleted is not deleted again, and is read by nobody any more, or as what was deleted."""
        path = operation.at({key: str(value) for key, value in case.path_parameters.items()})
        again = self._ask(self.callers["admin"].delete(path))
        if again.status != 404:
            self._fault(operation.label, f"a second delete: {again}", path)
        if any(each.label == f"GET {operation.path}" for each in self.world.operations):
            read = self._ask(self.callers["admin"].get(path))
            if read.status != 404 and read.json().get("status") not in ("deleted", "revoked"):
                self._fault(operation.label, f"use after delete: {read}", path)

    def _ask(self, asked: Coroutine[Any, Any, T]) -> T:
        """Ask on the loop of the kernel."""
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result(60)


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Without what is not generated: credentials are those of the callers, and any `X-Request-ID` is taken."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["security"] = []
            operation["parameters"] = [
                each for each in operation["parameters"] if not each.get("$ref", "").endswith("/X-Request-ID")
            ]
    return document


def _is_wrong(case: Case[Any], *places: ParameterLocation) -> bool:
    """Whether hypothesis made one of these parts wrong on purpose."""
    made = case.meta.components if case.meta is not None else {}
    return any(place in made and made[place].mode.is_negative for place in places)


def _do_not_wait(case: Case[Any]) -> None:
    """Long polls answer at once: what is waited for is no matter of the form of requests."""
    for part in (case.query, case.body):
        if isinstance(part, dict):
            for key in [key for key in part if key.startswith("wait") and _is_count(part[key])]:
                part[key] = 0


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value.strip().lstrip("+").isdigit())


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value.encode("utf-8").decode("latin1")


def _told(failure: Failure) -> str:
    return f"{failure.title}: {failure.message}"[:600]


def report(faults: Mapping[tuple[str, str], Sent]) -> str:
    """Every fault with its request."""
    return "\n\n".join(f"{label}: {each.fault}\n  {each.request}" for (label, _), each in sorted(faults.items()))
