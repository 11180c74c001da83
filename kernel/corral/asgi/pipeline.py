"""The request pipeline. Every HTTP request passes through the stages in the order in which `Pipeline._run` lists them.

Each stage is a method of the pipeline. The methods appear below in the same order.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Collection, Iterable
from typing import Any

from corral.asgi.async_handlers import AsyncHandlers
from corral.asgi.endpoint import PEOPLE, Endpoint
from corral.asgi.request import ClientLeft, IncomingRequest, Receive
from corral.asgi.request_log import MIN_STATUS, RequestAudit, log_request
from corral.asgi.response import ResponseSender, Send, problem_response, render
from corral.asgi.router import Router
from corral.asgi.streams import LongLivedConnections
from corral.asgi.unavailable import plugin_unavailable
from corral.auth.credentials import (
    CHALLENGE,
    KEEP_SECONDS,
    RECHECK_LABEL,
    REMEMBER_SECONDS,
    CredentialHeaders,
    read_credential,
)
from corral.auth.principal import Principal
from corral.clock import time_s
from corral.database.engine import InlineReadTimeout
from corral.database.unit import UnitContext
from corral.errors import Forbidden, Malformed, NotFound, Problem, Unauthorized, Unavailable
from corral.http.answers import IfMatch, Response, Wait
from corral.http.client_address import ClientAddress, Hosts
from corral.http.idempotency import Idempotency, IdempotencyKey
from corral.http.routes import API_PREFIX
from corral.kernel import Kernel
from corral.metrics.requests import BODY_CODES
from corral.plugin import Gate, RateLimiter
from corral.settings.kernel import ACCESS_LOG

log = logging.getLogger("corral.http")

MAX_URL, MAX_HEADERS, MAX_CACHED = 8 * 1024, 16 * 1024, 512
MAX_IN_FLIGHT = 1000
AUTHENTICATION_SECONDS = 0.3  # database timeout on routes that accept recently authenticated callers
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # labels of metrics


class Pipeline:
    """The ASGI application for HTTP requests.

    Each kernel has one instance, which holds no per-request state.
    """

    def __init__(self, kernel: Kernel, router: Router, endpoints: Iterable[Endpoint]) -> None:
        server = kernel.config.server
        self.router, self.credentials = router, kernel.credentials
        self.find_cached = functools.lru_cache(maxsize=1024)(router.find)  # walking the tree takes 3 µs
        self.database, self.feed = kernel.database, kernel.feed
        self.metrics, self.redactor, self.record_error = kernel.metrics, kernel.redactor, kernel.registry.add_error
        self.client_address = functools.lru_cache(maxsize=256)(ClientAddress(server.trusted_proxies))
        self.is_own_host = functools.lru_cache(maxsize=256)(Hosts(server.public_url, server.allowed_hosts))
        exempt = [path for each in endpoints if each.route.exempt_host for path in each.route.paths]
        self.open_to_any_host = frozenset([*exempt, *(f"{path}/" for path in exempt)])
        contributed = [gate for loaded in kernel.active for gate in loaded.contributions_to("corral_gates")]
        self.gates = tuple(gate for gate in contributed if isinstance(gate, Gate))
        self.rate_limiters = tuple(gate for gate in contributed if isinstance(gate, RateLimiter))
        newest_first = reversed(tuple(endpoints))  # the routes of built-in plugins decide about their paths
        self.explain_by_area = {each.route.path.split("/")[1]: each.route.explain for each in newest_first}
        self.connections = LongLivedConnections(self.gates)
        self.sender = ResponseSender(kernel, self.connections)
        self.settings, self.audit = kernel.settings, RequestAudit(kernel)
        self.idempotency = Idempotency(kernel.keyring)
        self.async_handlers = AsyncHandlers(kernel.database, self.idempotency)
        self.body_timeout = server.body_timeout_seconds
        self.draining = False

    def drain(self) -> None:
        """Prepare for shutdown. Long polls end within a second; other requests are still served."""
        self.draining = True

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one HTTP request. The ASGI server calls this method."""
        request = IncomingRequest(scope, receive, self.body_timeout)
        try:
            response = await self.respond(request)
            await self.sender.send(response, request, send)
        except ClientLeft:
            log.debug("client left before the end of the response", extra={"request_id": request.request_id})

    async def respond(self, request: IncomingRequest) -> Response:
        """Return the response to a request. Every failure becomes a problem document; only `ClientLeft` is raised."""
        began = time.perf_counter()
        code: str | None = None
        self.metrics.in_flight += 1
        try:
            response = await self._run(request)
        except Problem as problem:
            code = problem.code
            if code in BODY_CODES:
                self.metrics.body_rejected[code] += 1
            response = self.failure_response(problem, request)
        except ClientLeft:
            raise
        except Exception as error:
            code, response = "internal", self._internal_error(error, request)
        finally:
            self.metrics.in_flight -= 1
            for limiter, principal in request.metered:
                limiter.leave(principal)
        if self.draining and request.scope["http_version"] < "2":  # the next request goes to another process
            response.headers["Connection"] = "close"
        endpoint, status = request.endpoint, response.status
        is_audited = self.audit.log is not None and self.audit.log.verbose
        if is_audited and endpoint is not None and not endpoint.route.exempt_host:
            await self.audit.record(request, endpoint, status, code)
        method = request.method if request.method in METHODS else "other"
        seconds = time.perf_counter() - began
        self.metrics.observe(method, endpoint.route.path if endpoint else "unmatched", status, seconds)
        if status >= MIN_STATUS[self.settings.get(ACCESS_LOG)]:
            log_request(request, status, seconds)
        return response

    async def _run(self, request: IncomingRequest) -> Response:
        self.check_gates(request)
        endpoint = self._route(request)
        if isinstance(endpoint, Response):
            return endpoint
        if not endpoint.public:  # a public route ignores credentials
            await self._admit(request, endpoint)
        await self._read_input(request, endpoint)
        if endpoint.is_async:
            return await self.async_handlers.run(request, endpoint)
        value = await self._run_unit(request, endpoint)
        if isinstance(value, Wait):
            value = await self._long_poll(request, endpoint, value)
        return value if isinstance(value, Response) else render(value, endpoint, request)

    # -- gates

    def check_gates(self, request: IncomingRequest) -> None:
        """Check the size of the URL (414) and of the headers (431), and the `Host` header (400); then call the gates.

        Gates are checks that plugins contribute; they may refuse the client (403). All of these checks apply to HTTP
        requests and to WebSocket handshakes. Raise a `Problem` with the given status if a check fails.
        """
        if len(request.query) + len(request.path) > MAX_URL:
            raise Problem("The URL is longer than 8 KiB.", code="uri_too_long")
        if sum(map(len, itertools.chain.from_iterable(request.scope["headers"]))) > MAX_HEADERS:
            raise Problem("The headers are larger than 16 KiB.", code="headers_too_large")
        request.client_ip = self.client_address(request.peer, request.forwarded_for)
        request.refuse_repeated(b"host")
        if not self.is_own_host(request.headers.get(b"host")) and request.path not in self.open_to_any_host:
            detail = "The Host header names another host; add it to CORRAL_ALLOWED_HOSTS."
            raise Malformed(detail, code="invalid_host")
        for gate in self.gates:
            gate.check(request.client_ip, request.method, request.path)

    # -- route

    def _route(self, request: IncomingRequest) -> Endpoint | Response:
        """Return the endpoint for the path and method, or the response to an `OPTIONS` request.

        Raises problems with status 404, 405, 429 or 503.
        """
        raw_path: bytes = request.scope.get("raw_path") or b""  # a cache of long paths could take 60 MB
        found = (self.find_cached if len(raw_path) <= MAX_CACHED else self.router.find)(request.path, raw_path)
        methods, names = found or ({}, {})
        endpoint: Endpoint | None = methods.get("GET" if request.method == "HEAD" else request.method)
        if endpoint is None or endpoint.public or not request.has_credential:
            self.count_arrival(request, endpoint, anonymous=True)
        elif endpoint.client_rate:
            self.count_arrival(request, endpoint, anonymous=False)
        if found is None:
            raise NotFound("There is no operation at this path, or an id in the path is not a UUID.")
        if endpoint is None:
            return _options_response(request.method, methods)
        if endpoint.unavailable is not None:
            raise plugin_unavailable(endpoint.unavailable)
        if self.metrics.in_flight > MAX_IN_FLIGHT and not endpoint.route.exempt_host:
            raise Unavailable("Too many requests are in progress; try again.", code="overloaded")
        request.endpoint, request.label, request.path_names = endpoint, endpoint.label, names
        return endpoint

    def count_arrival(self, request: IncomingRequest, endpoint: Endpoint | None, *, anonymous: bool) -> None:
        """Count a request or WebSocket handshake against the rate limits of its client.

        Raise `TooMany` if the client exceeds a limit.
        """
        route = None if endpoint is None else endpoint.route
        for limiter in self.rate_limiters:
            if (quota := limiter.arrive(request.client_ip, route, anonymous=anonymous)) is not None:
                request.keep_strictest_quota(quota)

    # -- principal, rate limits, permission

    async def _admit(self, request: IncomingRequest, endpoint: Endpoint) -> Principal:
        """Authenticate the caller (401), apply rate limits (429) and check the permission (403).

        A long poll repeats this check every second, because the caller may have lost the permission. Repeated checks
        do not count against rate limits.
        """
        is_new = request.principal is None
        principal = await self._authenticate(request, endpoint)
        for limiter in self.rate_limiters if is_new else ():
            if (quota := limiter.enter(principal, endpoint.route, request.client_ip)) is not None:
                request.keep_strictest_quota(quota)
            request.metered.append((limiter, principal))
        if endpoint.route.delegable:
            principal = await self._delegate(request, principal)
        refusal = endpoint.authorization_error(principal)
        if refusal is not None and not endpoint.route.delegable:  # another process may have just granted the permission
            principal = await self._authenticate(request, endpoint, use_cache=False)
            refusal = endpoint.authorization_error(principal)
        request.principal = principal
        if refusal is not None:
            if endpoint.privileged:
                await self.audit.record(request, endpoint, refusal.status, refusal.code)
            raise refusal
        return principal

    async def _authenticate(self, request: IncomingRequest, endpoint: Endpoint, *, use_cache: bool = True) -> Principal:
        try:
            request.refuse_repeated(b"authorization", b"x-api-key")
            given = (request.headers.get(b"authorization"), request.headers.get(b"x-api-key"))
            principal = self.credentials.cached(given) if use_cache else None
            if principal is None:
                principal = await self._read_principal(request, endpoint, given)
            if principal.networks:
                principal.check_address(request.client_ip)
            if principal.expires_at is not None and principal.expires_at <= time_s():
                raise Unauthorized(code="token_expired", headers=CHALLENGE)
        except (Malformed, Unauthorized, Forbidden):  # an invalid credential counts as an anonymous request
            if request.has_credential:
                self.count_arrival(request, None, anonymous=True)
            raise
        return principal

    async def _read_principal(
        self, request: IncomingRequest, endpoint: Endpoint, given: CredentialHeaders
    ) -> Principal:
        """Authenticate the request's credential, cache the principal and return it.

        If the database fails or does not answer in time, a route marked `remembered` uses the cached principal for this
        credential, provided that it was cached in the last 15 minutes.
        """
        credential = read_credential(request.header("authorization"), request.header("x-api-key"))
        if credential is None:
            detail = "The request has no credential; send the header Authorization: Bearer <token>."
            raise Unauthorized(detail, headers={"WWW-Authenticate": "Bearer"})
        known = self.credentials.cached(given, REMEMBER_SECONDS) if endpoint.route.remembered else None
        entry = UnitContext("authentication" if request.principal is None else RECHECK_LABEL)
        try:
            async with asyncio.timeout(None if known is None else AUTHENTICATION_SECONDS):
                principal = await self.database.read(lambda: self.credentials.authenticate(credential), entry)
        except (Unavailable, TimeoutError):
            if known is None:
                raise
            return known
        self.credentials.cache(given, principal)
        return principal

    async def _delegate(self, request: IncomingRequest, principal: Principal) -> Principal:
        """Return the principal that the caller acts as.

        This is the principal that the request names in a delegation header, or the caller if there is no such header.
        """
        headers = ((header, request.header(header.lower())) for header in self.credentials.delegation_headers)
        named = {header: value for header, value in headers if value is not None}
        if not named:
            return principal
        return await self.database.read(lambda: self.credentials.act_as(principal, named), UnitContext("delegation"))

    # -- body, query

    async def _read_input(self, request: IncomingRequest, endpoint: Endpoint) -> None:
        """Read the body, the query and the idempotency key, and set the handler's arguments.

        Raises problems with status 400, 408, 413, 415 or 422.
        """
        route, signature, principal = endpoint.route, endpoint.signature, request.principal
        is_machine, names = principal is not None and principal.kind not in PEOPLE, request.path_names
        if is_machine and self.redactor.redact_json(names) != names:
            raise NotFound("The path must not contain a credential.")
        arguments = request.arguments = {**endpoint.services, **request.path_names}
        body = await request.read(route.body_limit) if request.may_have_body and route.multipart is None else b""
        if route.multipart is not None:
            arguments["body"] = request.chunks(route.body_limit)
        elif signature.body is not None:
            arguments["body"] = body if signature.body is bytes else await endpoint.parse_body(request, body)
        elif request.may_have_body:
            await endpoint.parse_body(request, body)  # refuses fields
        query = endpoint.default_query
        if request.query or (query is None and signature.query is not None):
            query = endpoint.parse_query(request.query)
        if query is not None:
            arguments["query"] = query
        if signature.caller is not None:
            arguments[signature.caller] = principal
        if signature.if_match is not None:
            arguments[signature.if_match] = IfMatch.parse(request.header("if-match"))
        if signature.request is not None:
            arguments[signature.request] = request
        if route.keyed and route.multipart is None and (given := request.headers.get(b"idempotency-key")) is not None:
            task_id = None if principal is None else principal.task_id
            if principal is not None:
                scope = f"{principal.kind}:{task_id or principal.id}"
            else:  # cookies distinguish anonymous clients that share an address
                scope = f"ip:{request.client_ip}\0{request.header('cookie') or ''}"
            request.idempotency_key = IdempotencyKey.of_request(
                given.decode("latin1"), scope, request.method, request.path, body, task_id
            )

    # -- unit of work: preconditions, handler

    async def _run_unit(self, request: IncomingRequest, endpoint: Endpoint) -> Any:
        """Run a `def` handler as one unit of work. The same unit claims the idempotency key, if there is one."""
        unit = functools.partial(endpoint.handler, **request.arguments)
        if request.idempotency_key is not None:
            unit = functools.partial(self._run_keyed, request, endpoint, request.idempotency_key)
        entry = request.unit_context(request.principal)
        if not endpoint.is_read:
            return await self.database.work(unit, entry=entry)
        read = functools.partial(endpoint.run_read, unit)
        if endpoint.inline:
            try:
                return self.database.read_now(read, entry)
            except InlineReadTimeout:
                endpoint.inline = False
        return await self.database.work(read, entry=entry, read=True)

    def _run_keyed(self, request: IncomingRequest, endpoint: Endpoint, key: IdempotencyKey) -> Response | Wait:
        stored = self.idempotency.claim_key(key)
        if stored is not None:
            return stored
        value = endpoint.handler(**request.arguments)
        if isinstance(value, Wait):
            self.idempotency.release_key(key)  # the handler changed nothing yet; the next run claims the key again
            return value
        response = render(value, endpoint, request)
        self.idempotency.store_response(key, response, response.body, secret=endpoint.route.no_store)
        return response

    async def _long_poll(self, request: IncomingRequest, endpoint: Endpoint, wait: Wait) -> Any:
        """Run the handler repeatedly until it returns a response instead of a `Wait`.

        The handler runs again when one of the topics in its `Wait` is notified, or when the `Wait` expires. No
        transaction is open in the meantime. The long poll also ends when the client disconnects, when the server shuts
        down, or when the caller loses the permission.
        """
        leaving = asyncio.ensure_future(request.disconnected())
        try:
            while True:
                with self.feed.subscribe(wait.topics) as notified:
                    value = await self._run_unit(request, endpoint)  # from here on no notification can be missed
                    if not isinstance(value, Wait):
                        return value
                    if value.topics == wait.topics:  # otherwise subscribe to the new topics first
                        await self._wait(request, endpoint, value.until, notified, leaving)
                    wait = value
        finally:
            leaving.cancel()

    async def _wait(
        self, request: IncomingRequest, endpoint: Endpoint, until: float, notified: asyncio.Event, leaving: Any
    ) -> None:
        """Wait until `notified` is set or the time `until` (in epoch seconds) is reached.

        Every `KEEP_SECONDS`, check again whether the caller may call the endpoint.
        """
        notification = asyncio.ensure_future(notified.wait())
        try:
            while not notified.is_set() and time_s() < until:
                seconds = min(until - time_s(), KEEP_SECONDS)
                await asyncio.wait({notification, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    raise ClientLeft
                if self.draining:
                    raise Unavailable("The server is shutting down; send the request again.", code="shutting_down")
                if not endpoint.public:  # the caller's permissions or principal may have changed
                    principal = await self._admit(request, endpoint)
                    if endpoint.signature.caller is not None:
                        request.arguments[endpoint.signature.caller] = principal
        finally:
            notification.cancel()

    # -- failures

    def failure_response(self, problem: Problem, request: IncomingRequest) -> Response:
        """Return the problem document that describes a failure.

        Details of server errors are redacted, because the error messages of dependencies may contain credentials.
        """
        if problem.status >= 500:
            problem.detail = self.redactor.redact(problem.detail)
            problem.members = self.redactor.redact_json(problem.members)
        explain = self.explain_by_area.get(request.path.removeprefix(API_PREFIX)[1:].partition("/")[0])
        return (explain and explain(problem, request)) or problem_response(problem, request)

    def _internal_error(self, error: Exception, request: IncomingRequest) -> Response:
        plugin = request.endpoint.route.plugin if request.endpoint else ""
        told = {"route": request.label, "plugin": plugin, "request_id": request.request_id}
        log.exception("request failed", extra=told)
        self.record_error(plugin, request.label, error, request.request_id)
        members: dict[str, Any] = {"plugin": plugin} if plugin else {}
        detail = "This is a bug in Corral or a plugin; look up the request id in the log."
        return self.failure_response(Problem(detail, **members), request)


def _options_response(method: str, methods: Collection[str]) -> Response:
    """Return the response to an `OPTIONS` request. Raise a problem with status 405 for every other method."""
    allowed = {*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else ())}
    allow = {"Allow": ", ".join(sorted(allowed))}
    if method == "OPTIONS":
        return Response(204, headers=allow)
    raise Problem(f"This path does not support {method}.", code="method_not_allowed", headers=allow)
