"""The request path: one function a stage, in the order in which a request meets them (`RequestPath.answer`)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from corral.asgi.access_log import AccessLog
from corral.asgi.audited import Audited
from corral.asgi.call import Call, Gone, Reply
from corral.asgi.callers import Callers
from corral.asgi.endpoint import Endpoint, parse_if_match
from corral.asgi.lasting import Lasting
from corral.asgi.own_units import OwnUnits, replay
from corral.asgi.table import Table
from corral.asgi.views import render
from corral.auth.credentials import KEEP_SECONDS, Credentials
from corral.auth.principal import Principal
from corral.clock import time_s
from corral.database.engine import Database, SlowRead
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import Malformed, NotFound, Problem, Unavailable
from corral.events.feed import Feed
from corral.http.answers import Request, Wait
from corral.http.client import ClientAddress, Hosts
from corral.http.idempotency import Idempotency, Keyed, Stored
from corral.metrics.requests import BODY_CODES, RequestMetrics
from corral.plugin import Audit, Gate, LeaseCallers, Meter
from corral.redact.redactor import Redactor
from corral.schema.shapes import encode

log = logging.getLogger("corral.http")

MAX_URL, MAX_HEADERS = 8 * 1024, 16 * 1024
MAX_IN_FLIGHT = 1000
Ringing = asyncio.Future[Any]
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # labels of metrics


class RequestPath:
    """Everything a request passes. One instance a kernel; it holds no request state."""

    def __init__(
        self,
        *,
        table: Table,
        database: Database,
        feed: Feed,
        credentials: Credentials,
        idempotency: Idempotency,
        hosts: Hosts,
        client: ClientAddress,
        gates: Sequence[Gate | Meter],
        metrics: RequestMetrics,
        redactor: Redactor,
        record: Callable[[str, str, BaseException, str | None], None],
        access_log: AccessLog,
        leases: LeaseCallers | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.table, self.database, self.feed = table, database, feed
        self.idempotency, self.hosts, self.client = idempotency, hosts, client
        self.gates = tuple(gate for gate in gates if isinstance(gate, Gate))
        self.metrics, self.redactor, self.record = metrics, redactor, record
        self.lasting = Lasting(self.gates)
        self.access_log, self.audited = access_log, Audited(database, audit)
        self.callers = Callers(credentials, gates, leases, self.audited, database)
        self._own_units = OwnUnits(database, idempotency)
        self.draining = False
        self._drained = asyncio.Event()

    def drain(self) -> None:
        """Shut down: readiness and liveness say so, long polls end now, requests in flight go on."""
        self.draining = True
        self._drained.set()

    async def answer(self, call: Call) -> Reply:
        """The reply to a call; a failure of any kind is a problem document. Raises only `Gone`."""
        began = time.perf_counter()
        endpoint: Any = None
        code: str | None = None
        self.metrics.in_flight += 1
        try:
            endpoint = self._route(call)
            reply = await self._serve(call, *endpoint) if isinstance(endpoint, tuple) else endpoint
        except Problem as problem:
            code = problem.code
            if code in BODY_CODES:
                self.metrics.body_rejected[code] += 1
            reply = problem_reply(self._shown(problem, endpoint), call)
        except (Gone, asyncio.CancelledError):
            raise
        except Exception as error:
            code, reply = "internal", self._bug(call, endpoint, error)
        finally:
            self.metrics.in_flight -= 1
            self.callers.leave(call)
        if self.draining and call.scope["http_version"] < "2":  # the client's next request goes elsewhere, uncut
            reply.headers["Connection"] = "close"
        if self.audited.verbose and isinstance(endpoint, tuple):
            await self.audited.seen(call, endpoint[0], reply.status, code)
        label = endpoint[0].route.path if isinstance(endpoint, tuple) else "unmatched"
        took = time.perf_counter() - began
        self.metrics.observe(call.method if call.method in METHODS else "other", label, reply.status, took)
        if reply.status >= self.access_log.least:
            self.access_log.write(call, endpoint, reply.status, took)
        return reply

    # -- stages

    def _route(self, call: Call) -> Any:
        """Host, gates, path and method: 400, 403, 404, 405; `OPTIONS` is answered here."""
        call.client_ip = self.client(call.scope)
        if len(call.query) + len(call.path) > MAX_URL:
            raise Problem("The URL is longer than 8 KiB.", code="uri_too_long")
        if sum(map(len, itertools.chain.from_iterable(call.scope["headers"]))) > MAX_HEADERS:
            raise Problem("The headers are larger than 16 KiB.", code="headers_too_large")
        found = self.table.find(call.path)
        if found is not None and _is_crooked(call.scope, found[0]):
            found = None
        methods = found[0] if found is not None else {}
        call.once(b"host")
        if not self.hosts(call.headers.get(b"host")) and not _is_exempt(methods):
            raise Malformed("The Host header names another host; add it to CORRAL_ALLOWED_HOSTS.", code="invalid_host")
        for gate in self.gates:
            gate.check(call.client_ip, call.method, call.path)
        endpoint = methods.get("GET" if call.method == "HEAD" else call.method)
        if self.callers.meters:
            self.callers.arrive(call, endpoint)
        if found is None:
            raise NotFound()
        if endpoint is None:
            return self._other_method(call, methods)
        if endpoint.door is not None:
            raise endpoint.door()
        if self.metrics.in_flight > MAX_IN_FLIGHT and not _is_exempt(methods):
            raise Unavailable("Too many requests in flight.", code="overloaded")
        return endpoint, found[1]

    @staticmethod
    def _other_method(call: Call, methods: dict[str, Any]) -> Reply:
        allowed = set(methods) | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        allow = {"Allow": ", ".join(sorted(allowed))}
        if call.method == "OPTIONS":
            return Reply(204, headers=allow)
        raise Problem(f"{call.method} is not served here.", code="method_not_allowed", headers=allow)

    async def _serve(self, call: Call, endpoint: Endpoint, names: dict[str, str]) -> Reply:
        caller: Principal | None = None
        if not endpoint.public:  # a public route takes no credential and looks at none
            caller = await self.callers.admit(call, endpoint)
        arguments: dict[str, Any] = {**endpoint.services, **names}
        body = await call.read(endpoint.route.body_limit) if call.may_have_body else b""
        if endpoint.signature.body is not None or call.may_have_body:
            shape = await endpoint.shape(call, names, body, caller)
            if endpoint.signature.body is not None:
                arguments["body"] = shape
        query = endpoint.parse_query(call.query)
        if query is not None:
            arguments["query"] = query
        self._parts(call, endpoint, caller, arguments)
        keyed = self._keyed(call, caller, body) if endpoint.route.keyed else None
        actor = caller.actor if caller is not None else ANONYMOUS
        entry = Entry(endpoint.label, actor, (), call.request_id, call.client_ip, call.header(b"user-agent"))
        if endpoint.is_async:
            return await self._own_units.run(call, endpoint, arguments, keyed, entry)
        return await self._run_unit(call, endpoint, arguments, keyed, entry)

    def _parts(self, call: Call, endpoint: Endpoint, caller: Principal | None, arguments: dict[str, Any]) -> None:
        wanted = endpoint.signature
        if wanted.caller is not None:
            arguments[wanted.caller] = caller
        if wanted.if_match is not None:
            arguments[wanted.if_match] = parse_if_match(call.header(b"if-match"))
        if wanted.request is not None:
            headers = {name.decode("latin1"): value.decode("latin1") for name, value in call.headers.items()}
            arguments[wanted.request] = Request(call.method, call.path, call.client_ip, call.request_id, headers)

    @staticmethod
    def _keyed(call: Call, caller: Principal | None, body: bytes) -> Keyed | None:
        key = call.header(b"idempotency-key")
        if key is None:
            return None
        cookie = call.header(b"cookie") or ""  # without a caller it tells apart who shares an address
        scope = f"{caller.kind}:{caller.task_id or caller.id}" if caller else f"ip:{call.client_ip}\0{cookie}"
        return Keyed.of(key, scope, call.method, call.path, body)

    # -- the unit

    async def _run_unit(
        self, call: Call, endpoint: Endpoint, arguments: dict[str, Any], keyed: Keyed | None, entry: Entry
    ) -> Reply:
        def unit() -> Any:
            if keyed is None:
                return endpoint.handler(**arguments)
            return self._keyed_unit(arguments, call, endpoint, keyed)

        answer = await self._once(endpoint, unit, entry)
        if isinstance(answer, Wait):
            answer = await self._wait(call, endpoint, arguments, unit, entry, answer)
        return answer if isinstance(answer, Reply) else render(answer, endpoint, call)

    def _keyed_unit(self, arguments: dict[str, Any], call: Call, endpoint: Endpoint, keyed: Keyed) -> Any:
        stored = self.idempotency.begin(keyed)
        if stored is not None:
            return replay(stored)
        value = endpoint.handler(**arguments)
        if isinstance(value, Wait):
            self.idempotency.forget(keyed)  # nothing happened yet; the next run begins anew
            return value
        reply = render(value, endpoint, call)
        self.idempotency.finish(keyed, Stored(reply.status, reply.headers, reply.body), secret=endpoint.route.no_store)
        return reply

    async def _once(self, endpoint: Endpoint, unit: Callable[[], Any], entry: Entry) -> Any:
        if not endpoint.is_read:
            return await self.database.work(unit, entry=entry)
        began = time.perf_counter()
        try:
            if endpoint.inline and self.database.inline_reads:
                try:
                    return self.database.read_now(unit, entry)
                except SlowRead:
                    endpoint.inline = False
            return await self.database.work(unit, entry=entry, read=True)
        finally:
            endpoint.measure(time.perf_counter() - began)

    async def _wait(
        self,
        call: Call,
        endpoint: Endpoint,
        arguments: dict[str, Any],
        unit: Callable[[], Any],
        entry: Entry,
        wait: Wait,
    ) -> Any:
        """Long poll: no transaction is held while it waits for the bell, the time, or the client's leaving."""
        leaving = asyncio.ensure_future(call.left())
        draining = asyncio.ensure_future(self._drained.wait())
        try:
            while True:
                with self.feed.waiting(wait.topics) as rung:
                    # once more, now that nothing can ring unheard
                    answer = await self._once(endpoint, unit, entry)
                    if not isinstance(answer, Wait):
                        return answer
                    if answer.topics != wait.topics:  # listen to these before anything else
                        wait = answer
                        continue
                    bell = asyncio.ensure_future(rung.wait())
                    due = False
                    try:
                        while not due:
                            due = await _rest(answer.until, bell, leaving, draining)
                            if not endpoint.public:  # its caller may have lost the right to it
                                self._parts(call, endpoint, await self.callers.admit(call, endpoint), arguments)
                    finally:
                        bell.cancel()
        finally:
            leaving.cancel()
            draining.cancel()

    def _shown(self, problem: Problem, endpoint: Any) -> Problem:
        """What a dependency or the remote side said may hold a credential. Some routes add members."""
        if problem.status >= 500:
            problem.detail = self.redactor.redact(problem.detail)
            problem.members = self.redactor.redact_json(problem.members)
        if isinstance(endpoint, tuple) and endpoint[0].route.explain is not None:
            problem.members.update(endpoint[0].route.explain(problem))
        return problem

    def _bug(self, call: Call, endpoint: Any, error: Exception) -> Reply:
        plugin = endpoint[0].route.plugin if isinstance(endpoint, tuple) else ""
        route = endpoint[0].label if isinstance(endpoint, tuple) else call.path
        log.exception("a route raised", extra={"route": route, "plugin": plugin, "request_id": call.request_id})
        self.record(plugin, route, error, call.request_id)
        problem = Problem("This is a bug; the log has it under the request id.")
        if plugin:
            problem.members["plugin"] = plugin
        return problem_reply(self._shown(problem, endpoint), call)


async def _rest(until: float, bell: Ringing, leaving: Ringing, draining: Ringing) -> bool:
    """Wait, for no longer than a caller is believed; whether the bell has rung or the time is over."""
    seconds = max(0.0, min(until - time_s(), KEEP_SECONDS))
    await asyncio.wait({bell, leaving, draining}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if leaving.done():
        raise Gone
    if draining.done():
        raise Unavailable("The server is shutting down; ask again.", code="shutting_down")
    return bell.done() or until <= time_s()


def problem_reply(problem: Problem, call: Call) -> Reply:
    """The problem document of a failure."""
    body = encode(problem.document(call.path, call.request_id))
    return Reply(problem.status, body, problem.headers, b"application/problem+json")


def _is_exempt(methods: dict[str, Any]) -> bool:
    """Whether health is asked for: by any host, and under load too."""
    return any(item.route.exempt_host for item in methods.values())


def _is_crooked(scope: Any, methods: dict[str, Any]) -> bool:
    """Paths with empty or dot segments, or with encoded separators, are nobody's; but some names have slashes."""
    path: str = scope["path"]
    if "//" in path or "\\" in path or "/./" in path or "/../" in path:
        return True
    raw: bytes = scope.get("raw_path") or b""
    if b"%" not in raw:
        return False
    marks = [b"%2e", b"%5c", b"%00"] + ([] if any(item.route.rest for item in methods.values()) else [b"%2f"])
    return any(mark in raw.lower() for mark in marks)
