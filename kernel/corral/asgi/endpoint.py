"""Endpoints: routes bound to their services. Everything that can be decided at boot is computed here once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from corral.asgi.request import IncomingRequest
from corral.auth.permissions import Permissions
from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.errors import Fault, Forbidden, Invalid, Malformed, Problem
from corral.http import signature
from corral.http.routes import Route
from corral.plugins.container import Container
from corral.plugins.record import PluginRecord
from corral.redact.redactor import Redactor, made_by
from corral.schema.shapes import convert
from corral.schema.strict_json import parse_json

PEOPLE = ("user", "api_key")
MAX_PARAMETERS = 100
LARGE_BODIES = ThreadPoolExecutor(1, "corral-bodies")  # one at a time: parsing needs many times a body's memory
INLINE_BODY = 64 * 1024  # bytes; larger bodies are parsed, and searched for credentials, in a thread
INLINE_AFTER, INLINE_BELOW, INLINE_ABOVE, INLINE_PENALTY = 20, 0.005, 0.050, 1000


class Endpoint:
    """A route that can serve requests: the handler, its services and its access rules.

    While the plugin is out of service, `unavailable` is set and returns the problem to respond with.
    """

    def __init__(self, route: Route, container: Container, record: PluginRecord) -> None:
        self.route = route
        self.handler = route.handler  # wrapped in a guard if the plugin is a third-party plugin
        self.signature = route.signature = route.signature or signature.read(route)
        self.label = route.label
        self.is_async = route.is_async
        self.is_read = route.method == "GET"
        self.public = PUBLIC in route.needs
        self.privileged = container.get(Permissions).are_privileged(route.needs)
        self.client_rate = route.rate is not None and route.rate.per == "client"
        self._needs = frozenset(route.needs)
        self._needs_permission_only = not (route.own_session or route.step_up or SIGNED_IN in route.needs)
        self.unavailable: Callable[[], Problem] | None = None
        self.container, self.record = container, record
        self.redactor = container.get(Redactor)
        self.rebind()
        self.versioned = self.signature.versioned
        self._lists = _list_fields(self.signature.query)
        query = self.signature.query
        self._default_query = None if query is None or _has_required(query) else msgspec.convert({}, query)
        self.pool_runs = 0
        self.inline = False

    def rebind(self) -> None:
        """Look up the handler's services again, because services of other plugins can appear and disappear."""
        self.services = self.container.services(self.signature.services, self.record, self.label)

    def authorize(self, principal: Principal) -> None:
        """Raise `Forbidden` unless the principal may call this route.

        The principal must hold one of the permissions in `needs` and fulfil the other conditions of the route, such
        as a session of its own or a recent re-authentication.
        """
        by_permission = self._needs_permission_only and principal.limited is None
        if by_permission and not self._needs.isdisjoint(principal.permissions):
            return
        route = self.route
        if principal.limited is not None and not self._serves_limited(principal):
            raise Forbidden(code=principal.limited)
        if not any(_holds(principal, need) for need in route.needs):
            needed = " or ".join(route.needs)
            if any(need in principal.out_of_scope for need in route.needs):
                raise Forbidden(f"The scopes of this API key do not include {needed}.", code="insufficient_scope")
            raise Forbidden(f"This operation needs the permission {needed}.")
        if principal.out_of_scope and not self.is_read and SIGNED_IN in route.needs:  # no scope covers self-service
            raise Forbidden("This operation needs an API key with the scope *.", code="insufficient_scope")
        if route.own_session and principal.session_id is None:
            code = "insufficient_scope" if principal.kind == "api_key" else "forbidden"
            raise Forbidden("Sign in for this operation; API keys and tokens are not accepted.", code=code)
        if route.step_up and not principal.has_stepped_up:
            if principal.kind != "api_key":
                detail = "Send your password or a one-time code to POST /auth/reauth first."
                raise Forbidden(detail, code="reauth_required")
            if principal.named_scopes.isdisjoint(route.needs):
                detail = f"The API key must name the scope {' or '.join(route.needs)}."
                raise Forbidden(detail, code="insufficient_scope")

    def allows(self, principal: Principal) -> bool:
        """Return whether `authorize` would succeed.

        On a route that can be delegated, a denied caller is allowed here: the permission check runs later, for the
        principal that the caller acts as.
        """
        try:
            self.authorize(principal)
        except Forbidden:
            return self.route.delegable
        return True

    def _serves_limited(self, principal: Principal) -> bool:
        """Return whether a principal with restricted access may call this route, which must be marked `limited`.

        Users who must change a password or set up MFA may call only routes for signed-in users (their own account).
        Other principals, such as workers awaiting approval, may call only the remaining routes.
        """
        return self.route.limited and (SIGNED_IN in self.route.needs) is (principal.kind in PEOPLE)

    def parse_query(self, raw: bytes) -> Any:
        """Return the query string converted to the shape that the handler declares.

        Raises `Malformed` or `Invalid`; the pointers of `Invalid` have the form `/query/<name>`.
        """
        if not raw and (self._default_query is not None or self.signature.query is None):
            return self._default_query
        try:
            pairs = parse_qsl(
                raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
            )
        except (ValueError, UnicodeDecodeError):
            raise Malformed(f"The query string is not UTF-8 or has more than {MAX_PARAMETERS} parameters.") from None
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in self._lists:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise Invalid.at(f"/query/{name}", "not_allowed", "Send this parameter once.")
            else:
                values[name] = value
        if self.signature.query is None:
            if values:
                faults = [Fault(f"/query/{name}", "unknown_field", "Unknown parameter.") for name in values]
                raise Invalid(f"{len(faults)} query parameters are unknown.", errors=faults)
            return None
        return convert(self.signature.query, values, strings=True, pointer_prefix="/query")

    async def parse_body(self, request: IncomingRequest, body: bytes) -> Any:
        """Return the body converted to the shape that the handler declares. A missing body is read as `{}`.

        If the route is `redacted`, credentials are removed from bodies that machines send. From bodies that people
        send, only the values of stored secrets are removed.
        """
        by_machine = request.principal is None or request.principal.kind not in PEOPLE
        given = (request.headers.get(b"content-type", b""), request.headers.get(b"content-encoding"), body, by_machine)
        context = made_by(*self._subject(request)) if self.route.redacted and by_machine else contextlib.nullcontext()
        with context:
            if len(body) > INLINE_BODY:
                run = functools.partial(contextvars.copy_context().run, self._parse_json, *given)
                return await asyncio.get_running_loop().run_in_executor(LARGE_BODIES, run)
            return self._parse_json(*given)

    def _subject(self, request: IncomingRequest) -> tuple[str, str]:
        """Return (type, id) of the object that a request concerns: a task for `/tasks/{id}/…`, otherwise the caller."""
        kind, _, rest = self.route.path[1:].partition("/")
        if rest.startswith("{id}") and "id" in request.path_names:
            return kind.removesuffix("s"), request.path_names["id"]
        principal = request.principal
        return (principal.kind, principal.id) if principal is not None else ("route", self.label)

    def _parse_json(self, content_type: bytes, encoding: bytes | None, body: bytes, by_machine: bool) -> Any:
        kind = self.signature.body
        if body:
            check_media_type(content_type, encoding)
        if kind is None:
            if body and parse_json(body) != {}:
                raise Invalid.at("", "unknown_field", "This operation takes no fields.")
            return None
        value = parse_json(body, lenient=self.route.lenient) if body else {}
        if self.route.redacted:
            if len(body) > INLINE_BODY:
                convert(kind, value)  # reject an invalid large body before the expensive search for credentials
            value = self.redactor.redact_json(value, patterns=by_machine)
        return convert(kind, value)

    def measure(self, seconds: float) -> None:
        """Record the duration of a read, and choose where the next read of this endpoint runs (docs/adr/0004).

        Reads move to the event loop after enough short reads in a thread, and back to a thread after a long read.
        """
        if self.inline:
            if seconds > INLINE_ABOVE:
                self.inline, self.pool_runs = False, -INLINE_PENALTY  # temporary: the machine may have been busy
        elif seconds < INLINE_BELOW:
            self.pool_runs += 1
            self.inline = self.pool_runs >= INLINE_AFTER


def _holds(principal: Principal, need: str) -> bool:
    if need == ANY_CALLER:
        return principal.registration_key_id is None  # registration keys may only register workers
    return (need == SIGNED_IN and principal.kind in PEOPLE) or need in principal.permissions


def check_media_type(content_type: bytes, encoding: bytes | None) -> None:
    """Raise `unsupported_media_type` unless the body is uncompressed `application/json` in UTF-8."""
    if encoding not in (None, b"identity"):
        raise Problem("Send the body without Content-Encoding.", code="unsupported_media_type")
    media, _, parameters = content_type.lower().partition(b";")
    charset = parameters.partition(b"charset=")[2].strip(b' "')
    if media.strip() != b"application/json" or charset not in (b"", b"utf-8"):
        raise Problem("Send JSON with Content-Type: application/json.", code="unsupported_media_type")


@functools.cache
def _has_required(kind: Any) -> bool:
    is_shape = inspect.isclass(kind) and issubclass(kind, msgspec.Struct)
    return is_shape and any(field.required for field in msgspec.structs.fields(kind))


@functools.cache
def _list_fields(kind: Any) -> frozenset[str]:
    """Return the names of the query parameters that may be repeated."""
    info = msgspec.inspect.type_info(kind)
    found = set()
    for field in getattr(info, "fields", ()):
        options = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        if any(isinstance(option, (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)) for option in options):
            found.add(field.encode_name)
    return frozenset(found)
