"""A route, bound to its services: everything that can be decided at boot is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from corral.asgi.call import Call
from corral.auth.permissions import Permissions
from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.errors import Fault, Forbidden, Invalid, Malformed, Problem
from corral.http import signature
from corral.http.answers import IfMatch
from corral.http.routes import Route
from corral.plugins.container import Container, Scope
from corral.redact.redactor import Redactor, made_by
from corral.schema.shapes import convert
from corral.schema.strict_json import parse_json

PEOPLE = ("user", "api_key")
MAX_PARAMETERS = 100
LARGE_BODIES = ThreadPoolExecutor(1, "corral-bodies")  # one at a time: parsed, a body is many times its size
INLINE_BODY = 64 * 1024  # larger ones are parsed, and searched for credentials, in a thread
INLINE_AFTER, INLINE_BELOW, INLINE_ABOVE, INLINE_PENALTY = 20, 0.005, 0.050, 1000


class Endpoint:
    """What the table leads to. `door` is the problem that answers instead while the plugin is out of service."""

    def __init__(self, route: Route, container: Container, room: Scope) -> None:
        self.route = route
        self.handler = route.handler  # with a guard around it, where the plugin is a third party's
        self.signature = signature.read(route)
        self.label = route.label
        self.is_async = route.is_async
        self.is_read = route.method == "GET"
        self.public = PUBLIC in route.needs
        self.privileged = container.get(Permissions).are_privileged(route.needs)
        self.client_rate = route.rate is not None and route.rate.per == "client"
        self._needs = frozenset(route.needs)
        self._suffices = not (route.own_session or route.step_up or SIGNED_IN in route.needs)  # one of `needs`, by name
        self.door: Callable[[], Problem] | None = None
        self.container, self.room = container, room
        self.redactor = container.get(Redactor)
        self.services: dict[str, Any] = {}
        self.rebind()
        self.versioned = self.signature.versioned
        self._lists = _list_fields(self.signature.query)
        self._default_query = self._without_query()
        self.pool_runs = 0
        self.inline = False

    def rebind(self) -> None:
        """Fill in the services as they are now."""
        self.services = self.container.services(self.signature.services, self.room, self.label)

    def permit(self, caller: Principal) -> None:
        """Raise `Forbidden` unless one of `needs` is held, in the way that the route asks for."""
        if self._suffices and caller.limited is None and not self._needs.isdisjoint(caller.permissions):
            return
        route = self.route
        if caller.limited is not None and not self._serves_limited(caller):
            raise Forbidden(code=caller.limited)
        if not any(_holds(caller, need) for need in route.needs):
            needed = " or ".join(route.needs)
            if any(need in caller.beyond for need in route.needs):
                raise Forbidden(f"The key's scopes leave out {needed}.", code="insufficient_scope")
            raise Forbidden(f"This needs the permission {needed}.")
        if caller.beyond and not self.is_read and SIGNED_IN in route.needs:  # self-service is no permission of its own
            raise Forbidden("For this the key needs all rights of its owner: the scope *.", code="insufficient_scope")
        if route.own_session and caller.session_id is None:
            code = "insufficient_scope" if caller.kind == "api_key" else "forbidden"
            raise Forbidden("Sign in for this; a key or token does not suffice.", code=code)
        if route.step_up and not caller.has_stepped_up:
            if caller.kind != "api_key":
                raise Forbidden("Give the password or a code to POST /auth/reauth first.", code="reauth_required")
            if caller.named.isdisjoint(route.needs):
                raise Forbidden(f"The key must name the scope {' or '.join(route.needs)}.", code="insufficient_scope")

    def _serves_limited(self, caller: Principal) -> bool:
        """People who must first do something are served at their own account, machines without approval elsewhere."""
        return self.route.limited and (SIGNED_IN in self.route.needs) is (caller.kind in PEOPLE)

    def refuses(self, caller: Principal) -> bool:
        """Whether `permit` would raise. Who acts under a lease is known later, with other rights."""
        if self.route.on_lease:
            return False
        try:
            self.permit(caller)
        except Forbidden:
            return True
        return False

    def parse_query(self, raw: bytes) -> Any:
        """The query as its shape; every problem has a pointer `/query/<name>`."""
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
                raise Invalid.at(f"/query/{name}", "not_allowed", "Give this parameter once.")
            else:
                values[name] = value
        if self.signature.query is None:
            if values:
                faults = [Fault(f"/query/{name}", "unknown_field", "No such parameter here.") for name in values]
                raise Invalid(f"{len(faults)} parameters are not known here", errors=faults)
            return None
        return convert(self.signature.query, values, strings=True, pointer_prefix="/query")

    async def shape(self, call: Call, names: Mapping[str, str], body: bytes, caller: Principal | None) -> Any:
        """The body as its shape; a missing one equals `{}`. Of what people write only stored values are taken out."""
        machine = caller is None or caller.kind not in PEOPLE
        given = (call.header(b"content-type"), call.header(b"content-encoding"), body, machine)
        with made_by(*self._object(names, caller)) if self.route.redacted and machine else contextlib.nullcontext():
            if len(body) > INLINE_BODY:
                run = functools.partial(contextvars.copy_context().run, self._parse_body, *given)
                return await asyncio.get_running_loop().run_in_executor(LARGE_BODIES, run)
            return self._parse_body(*given)

    def _object(self, names: Mapping[str, str], caller: Principal | None) -> tuple[str, str]:
        """What the call is about: `/tasks/{id}/…` a task; else who calls."""
        kind, _, rest = self.route.path[1:].partition("/")
        if rest.startswith("{id}") and "id" in names:
            return kind.removesuffix("s"), names["id"]
        return (caller.kind, caller.id) if caller is not None else ("route", self.label)

    def _parse_body(self, content_type: str | None, encoding: str | None, body: bytes, machine: bool) -> Any:
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
                convert(kind, value)  # what is refused anyway is not searched
            value = self.redactor.redact_json(value, patterns=machine)
        return convert(kind, value)

    def measure(self, seconds: float) -> None:
        """Reads earn their place on the event loop by being short, and lose it by being long (docs/adr/0004)."""
        if self.inline:
            if seconds > INLINE_ABOVE:
                self.inline, self.pool_runs = False, -INLINE_PENALTY  # not for ever: the machine may have been busy
        elif seconds < INLINE_BELOW:
            self.pool_runs += 1
            self.inline = self.pool_runs >= INLINE_AFTER

    def _without_query(self) -> Any:
        kind = self.signature.query
        return None if kind is None or _has_required(kind) else msgspec.convert({}, kind)


def _holds(caller: Principal, need: str) -> bool:
    if need == ANY_CALLER:
        return caller.registration_key_id is None  # those register, and do nothing else
    return (need == SIGNED_IN and caller.kind in PEOPLE) or need in caller.permissions


def check_media_type(content_type: str | None, encoding: str | None) -> None:
    """`application/json` in UTF-8 and nothing else."""
    if encoding not in (None, "identity"):
        raise Problem("Send the body without Content-Encoding.", code="unsupported_media_type")
    media, _, parameters = (content_type or "").partition(";")
    charset = parameters.partition("charset=")[2].strip(' "').lower()
    if media.strip().lower() != "application/json" or charset not in ("", "utf-8"):
        raise Problem("Send JSON with Content-Type: application/json.", code="unsupported_media_type")


def parse_if_match(header: str | None) -> IfMatch:
    """`"7"` or `*`; a tag of another form can match no version."""
    if header is None or header.strip() == "*":
        return IfMatch()
    tag = header.strip().strip('"')
    return IfMatch(version=int(tag)) if tag.isascii() and tag.isdigit() and len(tag) < 19 else IfMatch(stale=True)


@functools.cache
def _has_required(kind: Any) -> bool:
    is_shape = inspect.isclass(kind) and issubclass(kind, msgspec.Struct)
    return is_shape and any(field.required for field in msgspec.structs.fields(kind))


@functools.cache
def _list_fields(kind: Any) -> frozenset[str]:
    """The parameters that may be repeated."""
    info = msgspec.inspect.type_info(kind)
    found = set()
    for field in getattr(info, "fields", ()):
        options = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        if any(isinstance(option, (msgspec.inspect.ListType, msgspec.inspect.VarTupleType)) for option in options):
            found.add(field.encode_name)
    return frozenset(found)
