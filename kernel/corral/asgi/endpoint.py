"""Defines endpoints, which are routes bound to their services.

Everything about an endpoint that does not depend on the request is computed at boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import json
import time
import typing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, parse_qsl

import msgspec

from corral.asgi.request import IncomingRequest
from corral.auth.permissions import Permissions
from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.errors import CODES, FieldError, Forbidden, Invalid, Malformed, Problem
from corral.http.handler_signature import hints, read_signature, union_parts
from corral.http.routes import Route
from corral.plugins.container import Container
from corral.plugins.record import PluginRecord
from corral.redact.redactor import Redactor, redacting_machine_text
from corral.schema.conversion import convert
from corral.schema.fields import IDENTIFIER, OpenShape
from corral.schema.strict_json import parse_json

JSON, FORM = b"application/json", b"application/x-www-form-urlencoded"
PEOPLE = ("user", "api_key")
MAX_PARAMETERS = 100
LARGE_BODIES = ThreadPoolExecutor(1, "corral-bodies")  # one at a time: parsing needs many times a body's memory
INLINE_BODY = 64 * 1024  # bytes; larger bodies are parsed, and searched for credentials, in a thread
INLINE_AFTER, INLINE_BELOW, INLINE_ABOVE, INLINE_PENALTY = 20, 0.005, 0.050, 1000


class Endpoint:
    """A route that can serve requests: the handler, its services and its access rules.

    `handler` is the function that handles requests; for a third-party plugin, it is wrapped in a guard. While the
    route's plugin is out of service, `unavailable` is the record of the plugin; otherwise it is None.
    """

    def __init__(self, route: Route, container: Container, record: PluginRecord, handler: Callable[..., Any]) -> None:
        self.route, self.handler = route, handler
        self.signature = route.signature = route.signature or read_signature(route)
        self.label = route.label
        self.is_async = route.is_async
        self.is_read = route.method == "GET"
        self.returns_version = self.signature.returns_version
        self.public = PUBLIC in route.needs
        self.privileged = container.get(Permissions).are_privileged(route.needs)
        self.client_rate = route.rate is not None and route.rate.per == "client"
        self._needs = frozenset(route.needs)
        self._needs_permission_only = not (route.own_session or route.step_up or SIGNED_IN in route.needs)
        self.unavailable: PluginRecord | None = None
        self._container, self._record = container, record
        self._redactor = container.get(Redactor)
        self.rebind()
        self.default_query = _parse_empty_query(self.signature.query)
        self._short_reads = 0
        self.inline = False  # whether the next read runs on the event loop

    def rebind(self) -> None:
        """Look up the handler's services again, because services of other plugins can appear and disappear."""
        self.services = self._container.resolve_services(self.signature.services, self._record, self.label)

    def authorization_error(self, principal: Principal) -> Forbidden | None:
        """Return an error that explains why the principal may not call this route, or None if the call is allowed.

        The principal must hold one of the permissions in the route's `needs`. Some routes also require a signed-in
        session (API keys and tokens are refused) or recent re-authentication.
        """
        by_permission = self._needs_permission_only and principal.limited is None
        if by_permission and not self._needs.isdisjoint(principal.permissions):
            return None
        route, needed = self.route, " or ".join(self.route.needs)
        if principal.limited is not None and not self._is_open_to_restricted(principal):
            return Forbidden(CODES[principal.limited].remedy, code=principal.limited)
        if not any(_holds(principal, need) for need in route.needs):
            if self._needs.isdisjoint(principal.out_of_scope):
                return Forbidden(f"This operation needs the permission {needed}.")
            return Forbidden(f"The scopes of this API key do not include {needed}.", code="insufficient_scope")
        if principal.out_of_scope and not self.is_read and SIGNED_IN in route.needs:  # no scope covers self-service
            return Forbidden("This operation needs an API key with the scope *.", code="insufficient_scope")
        if route.own_session and principal.session_id is None:
            code = "insufficient_scope" if principal.kind == "api_key" else "forbidden"
            return Forbidden("Sign in for this operation; API keys and tokens are not accepted.", code=code)
        if route.step_up and not principal.has_stepped_up:
            if principal.kind != "api_key":
                detail = "Confirm your password or a one-time code with `corral api POST /auth/reauth` first."
                return Forbidden(detail, code="reauth_required")
            if principal.named_scopes.isdisjoint(route.needs):
                return Forbidden(f"The API key must list the scope {needed} explicitly.", code="insufficient_scope")
        return None

    def _is_open_to_restricted(self, principal: Principal) -> bool:
        """Return whether a principal with restricted access may call this route.

        Such principals may call only routes that are marked `limited`. Some `limited` routes need `SIGNED_IN` and
        manage the user's own account; users who must change a password or set up MFA may call these. Machines, such as
        workers awaiting approval, may call all other `limited` routes.
        """
        return self.route.limited and (SIGNED_IN in self.route.needs) is (principal.kind in PEOPLE)

    def parse_query(self, raw: bytes) -> Any:
        """Parse the query string and convert it to the type that the handler declares.

        Raise `Malformed` if the query string cannot be parsed, or `Invalid` if a parameter is unknown or invalid. The
        pointers in `Invalid` have the form `/query/<name>`.
        """
        try:
            given = parse_qs(
                raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
            )
        except (ValueError, UnicodeDecodeError):
            raise Malformed(f"The query string is not UTF-8 or has more than {MAX_PARAMETERS} parameters.") from None
        if self.signature.query is None:
            if given:
                faults = [FieldError(f"/query/{name}", "unknown_field", "Unknown parameter.") for name in given]
                raise Invalid(f"This operation takes no query parameters ({len(faults)} given).", errors=faults)
            return None
        lists = _marked_fields(self.signature.query, list)
        for name, values in given.items():
            if len(values) > 1 and name not in lists:
                raise Invalid.at(f"/query/{name}", "not_allowed", "Send this parameter once.")
        query = {name: values if name in lists else values[0] for name, values in given.items()}
        return convert(self.signature.query, query, strings=True, pointer_prefix="/query")

    async def parse_body(self, request: IncomingRequest, body: bytes) -> Any:
        """Parse the body and convert it to the type that the handler declares. A missing body is treated as `{}`.

        By default, stored secrets and everything that looks like a credential are removed from bodies that machines
        send, and bodies that people send are not changed. If the route sets `redacted` to False, nothing is removed. If
        it sets `redacted` to True, stored secrets are also removed from bodies that people send. An identifier that
        contains a credential is always refused.
        """
        if body:
            media = FORM if self.route.form else JSON
            check_media_type(request.headers.get(b"content-type", b""), request.headers.get(b"content-encoding"), media)
            body = form_as_json(body) if self.route.form else body
        machine = request.principal is not None and request.principal.kind not in PEOPLE
        context = redacting_machine_text(*self._requested_object(request)) if machine else contextlib.nullcontext()
        with context:
            if len(body) > INLINE_BODY:
                run = contextvars.copy_context().run
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(LARGE_BODIES, run, self._parse_json, body, machine)
            return self._parse_json(body, machine)

    def _requested_object(self, request: IncomingRequest) -> tuple[str, str]:
        """Return the type and id of the object that a request concerns.

        If the path names an object, such as the task in `/tasks/{id}/…`, the request concerns that object. For other
        paths, it concerns the caller, or the route if there is no caller.
        """
        kind, _, rest = self.route.path[1:].partition("/")
        if rest.startswith("{id}") and "id" in request.path_names:
            return kind.removesuffix("s"), request.path_names["id"]
        principal = request.principal
        return (principal.kind, principal.id) if principal is not None else ("route", self.label)

    def _parse_json(self, body: bytes, machine: bool) -> Any:
        kind = self.signature.body
        if kind is None:
            if body and parse_json(body) != {}:
                raise Invalid.at("", "unknown_field", "This operation takes no fields.")
            return None
        value = parse_json(body, lenient=self.route.lenient) if body else {}
        for name in _marked_fields(kind, IDENTIFIER) & (value.keys() if isinstance(value, dict) else set()):
            if self._redactor.redact_json(value[name], patterns=machine) != value[name]:
                raise Invalid.at(f"/{name}", "not_allowed", "must not contain a credential")
        if (machine if self.route.redacted is None else self.route.redacted) and not self._redactor.is_clean(body):
            if len(body) > INLINE_BODY:
                convert(kind, value)  # reject an invalid large body before the expensive search for credentials
            value = self._redactor.redact_json(value, patterns=machine)
        converted = convert(kind, value)
        if isinstance(converted, OpenShape):
            converted.__dict__["undeclared"] = {key: value[key] for key in value.keys() - kind.__struct_fields__}
        return converted

    def run_read(self, read: Callable[[], Any]) -> Any:
        """Run a read-only handler and measure its duration.

        The duration determines where the next calls of the handler run (docs/adr/0004): on the event loop after enough
        short calls in a thread, and in a thread again after a long call. The time that a call waits for a thread is not
        measured, because it would make every call seem long when many requests arrive together.
        """
        began = time.perf_counter()
        try:
            return read()
        finally:
            seconds = time.perf_counter() - began
            if self.inline and seconds > INLINE_ABOVE:
                self.inline, self._short_reads = False, -INLINE_PENALTY  # temporary: the machine may have been busy
            elif not self.inline and seconds < INLINE_BELOW:
                self._short_reads += 1  # two threads may count one read together, which delays the move a little
                self.inline = self._short_reads >= INLINE_AFTER


def _holds(principal: Principal, need: str) -> bool:
    if need == ANY_CALLER:
        return principal.registration_key_id is None  # registration keys may only register workers
    return (need == SIGNED_IN and principal.kind in PEOPLE) or need in principal.permissions


def form_as_json(body: bytes) -> bytes:
    """Return the fields of a submitted HTML form as JSON, so that the strict JSON parser can read them.

    Raise `Malformed` if a field occurs twice, or if the form has too many fields or is not UTF-8.
    """
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise Malformed(f"The form is not UTF-8 or has more than {MAX_PARAMETERS} fields.") from None
    if len(fields := dict(pairs)) < len(pairs):
        raise Malformed("A field of the form occurs twice.")
    return json.dumps(fields).encode()


def check_media_type(content_type: bytes, encoding: bytes | None, wanted: bytes) -> None:
    """Raise `unsupported_media_type` unless the body is unencoded UTF-8 of the media type `wanted`."""
    if encoding not in (None, b"identity"):
        raise Problem("Send the body without Content-Encoding.", code="unsupported_media_type")
    media, _, parameters = content_type.lower().partition(b";")
    charset = parameters.partition(b"charset=")[2].strip(b' "')
    if media.strip() != wanted or charset not in (b"", b"utf-8"):
        detail = f"Send the body in UTF-8 with Content-Type: {wanted.decode()}."
        raise Problem(detail, code="unsupported_media_type")


@functools.cache
def _parse_empty_query(query: Any) -> Any:
    """Return the parsed form of an empty query string.

    Return None if the handler takes no query or requires a parameter.
    """
    try:
        return msgspec.convert({}, query)
    except msgspec.ValidationError:
        return None


@functools.lru_cache(maxsize=2048)  # reading the fields of all shapes at boot takes a tenth of a start
def _marked_fields(shape: Any, mark: Any) -> frozenset[str]:
    """Return the names of the fields whose type has the given mark (see `_marks`).

    A union type has the marks of all its members.
    """
    kinds = hints(shape) if isinstance(shape, type) else {}
    return frozenset(name for name, kind in kinds.items() if any(mark in _marks(part) for part in union_parts(kind)))


def _marks(kind: Any) -> tuple[Any, ...]:
    """Return the marks of the type `kind`.

    Marks are the generic origin of the type, such as `list`, the generic origin of the type inside `Annotated`, and the
    annotations.
    """
    return *map(typing.get_origin, (kind, getattr(kind, "__origin__", None))), *getattr(kind, "__metadata__", ())
