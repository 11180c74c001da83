"""Generates the OpenAPI 3.1 document of the declared routes, including the problems that each route may return.

The document is complete: responses contain no status, code or schema that is missing from it. Routes declare their
own problem codes in `raises`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import chain
from typing import Annotated, Any

import msgspec

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN
from corral.errors import CODES, LIMITING_CODES, Fault
from corral.http.answers import Answer, Stream, Text
from corral.http.page import Page, PageQuery
from corral.http.routes import API_PREFIX, Route
from corral.http.signature import Signature, read
from corral.schema.shapes import components, encode

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_SCHEMAS = "#/components/schemas/"

# Problem codes that every route may return. Every route reads an announced body, even if its handler takes none, and
# refuses unknown query parameters.
EVERYWHERE = """
malformed_request malformed_json ip_blocked method_not_allowed request_timeout payload_too_large uri_too_long
unsupported_media_type validation_error concurrency_limit rate_limited headers_too_large internal overloaded
dependency_unavailable shutting_down storage_full plugin_disabled plugin_failed audit_unavailable"""
EVERY_ROUTE = frozenset(EVERYWHERE.split())
ALWAYS = ("X-Request-ID", "Cache-Control", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
_NEEDS = {PUBLIC: "no credential", SIGNED_IN: "a signed-in user", ANY_CALLER: "any valid credential"}
WITH_STATUS = {401: "WWW-Authenticate", 405: "Allow", 409: "Retry-After", 429: "Retry-After", 503: "Retry-After"}
CREDENTIALS: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]


class Problem(msgspec.Struct, kw_only=True):
    """The problem document of a failure (RFC 9457). Some codes add members, such as `current_status`."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: Annotated[list[Fault], msgspec.Meta(max_length=100)] | msgspec.UnsetType = msgspec.UNSET


def document(routes: Iterable[Route], *, title: str, version: str, public_url: str | None) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the routes. The result does not depend on the order of the routes.

    Raises `TypeError` naming the route whose handler or shapes cannot be described.
    """
    writer = _Writer(sorted(routes, key=lambda route: (route.path, METHODS.index(route.method))))
    found = json.loads(files("corral.http.docs").joinpath("frame.json").read_bytes())
    found["info"] |= {"title": title, "version": version}
    found["servers"] = [{"url": public_url.rstrip("/") if public_url else "/"}]
    found["tags"] = [{"name": tag} for tag in sorted({route.tag for route in writer.routes})]
    found["paths"] = writer.paths()
    found["components"]["schemas"] = writer.schemas(found["paths"])
    found["components"]["responses"] = dict(sorted(writer.responses.items()))
    return dict(found)


def problems(route: Route, signature: Signature) -> dict[int, set[str]]:
    """Return the problem codes that the route may return, by status. Codes that no plugin declares are left out."""
    codes = {*EVERY_ROUTE, *route.raises}
    if not route.exempt_host:
        codes.add("invalid_host")
    if PUBLIC not in route.needs:
        codes |= {"unauthenticated", "token_expired", "session_revoked"}
        open_to_all = ANY_CALLER in route.needs and not route.own_session
        codes |= {"forbidden"} if open_to_all else {"forbidden", "insufficient_scope"}
        codes |= {"reauth_required"} if route.step_up else set()
        codes |= set() if route.limited else LIMITING_CODES
    if route.names:
        codes.add("not_found")
    if route.keyed:
        codes |= {"idempotency_in_progress", "idempotency_key_reused"}
    if signature.if_match is not None:
        codes.add("precondition_failed")
    query = typing.get_origin(signature.query) or signature.query
    if inspect.isclass(query) and issubclass(query, PageQuery):
        codes.add("invalid_cursor")
    found: dict[int, set[str]] = {}
    for code in codes & CODES.keys():
        found.setdefault(CODES[code][0], set()).add(code)
    return found


class _Operation(msgspec.Struct):
    """A route with the schemas of its body, query and responses."""

    id: str
    route: Route
    signature: Signature
    body: dict[str, Any]
    query: dict[str, Any]
    answers: list[dict[str, Any]]


class _Writer:
    """Writes the operations of the document and collects the response components that they share."""

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes
        self.responses: dict[str, dict[str, Any]] = {}
        self.operations: list[_Operation] = []
        signatures = [route.signature or read(route) for route in routes]
        kinds = [[signature.body, signature.query, *map(_item, signature.answers)] for signature in signatures]
        (self.problem, self.page, *rest), self.named = _described(routes, kinds)
        left = iter(rest)
        for name, route, signature, wanted in zip(_ids(routes), routes, signatures, kinds, strict=True):
            body, query, *answers = [next(left) for _ in wanted]
            shapes = zip(signature.answers, answers, strict=True)
            answers = [self._paged(each) if _item(kind) is not kind else each for kind, each in shapes]
            answers += [{"type": "null"}] if types.NoneType in signature.returned else []
            self.operations.append(_Operation(name, route, signature, body, query, answers))

    def paths(self) -> dict[str, dict[str, Any]]:
        """Return all operations by path and method. A route with two paths appears at both."""
        found: dict[str, dict[str, Any]] = {}
        for each in self.operations:
            written = self._operation(each)
            for path in each.route.paths:
                own = {} if path.startswith(API_PREFIX) else {"operationId": f"{each.id}_at_root"}
                found.setdefault(path, {})[each.route.method.lower()] = {**written, **own}
        return dict(sorted(found.items()))

    def schemas(self, paths: Any) -> dict[str, Any]:
        """Return the schema components that paths and responses refer to.

        The shapes of queries are described as parameters, not as components.
        """
        found: set[str] = set()
        new = _references([paths, self.responses])
        while new:
            found |= new
            new = _references([self.named[name] for name in new]) - found
        return {name: self.named[name] for name in sorted(found)}

    def _operation(self, each: _Operation) -> dict[str, Any]:
        written: dict[str, Any] = {"operationId": each.id, "tags": [each.route.tag], "summary": each.route.summary}
        needs = f"Needs {' or '.join(_NEEDS.get(need, f'`{need}`') for need in each.route.needs)}."
        written["description"] = "\n\n".join(filter(None, (each.route.description, needs)))
        taken = [{"$ref": f"#/components/parameters/{name}"} for name in _taken(each)]
        written["parameters"] = [*self._parameters(each), *taken]
        if each.signature.body is not None:
            written["requestBody"] = {
                "description": f"At most {each.route.body_limit // 1024} KiB.",
                "required": self._is_demanded(each.body),
                "content": {"application/json": {"schema": each.body}},
            }
        answers = _successes(each)
        for status, codes in problems(each.route, each.signature).items():
            answers[str(status)] = self._refusal(status, sorted(codes))
        written["responses"] = dict(sorted(answers.items()))
        written["security"] = [] if PUBLIC in each.route.needs else CREDENTIALS
        return written

    def _parameters(self, each: _Operation) -> Iterator[dict[str, Any]]:
        for name in each.route.names:
            is_id = name == "id" or name.endswith("_id")
            schema = {"type": "string", **({"format": "uuid"} if is_id else {"minLength": 1, "maxLength": 200})}
            yield {"name": name, "in": "path", "required": True, "schema": schema}
        shape = self._resolved(each.query)
        for name, schema in shape.get("properties", {}).items():
            schema = _without_null(schema)
            found: dict[str, Any] = {"name": name, "in": "query", "required": name in shape.get("required", ())}
            if "description" in schema:
                found["description"] = schema.pop("description")
            if self._resolved(schema).get("type") == "array":
                found |= {"style": "form", "explode": True}
            yield {**found, "schema": schema}

    def _refusal(self, status: int, codes: list[str]) -> dict[str, str]:
        name = ".".join((str(status), *(code for code in codes if code not in EVERY_ROUTE)))
        narrowed = {"properties": {"status": {"const": status}, "code": {"enum": codes}}}
        self.responses[name] = {
            "description": "; ".join(dict.fromkeys(CODES[code][1] for code in codes)) + ".",
            "headers": _headers(*ALWAYS, *([WITH_STATUS[status]] if status in WITH_STATUS else ())),
            "content": {"application/problem+json": {"schema": {"allOf": [self.problem, narrowed]}}},
        }
        return {"$ref": f"#/components/responses/{name}"}

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        return self._resolved(self.named[schema["$ref"].removeprefix(_SCHEMAS)]) if "$ref" in schema else schema

    def _paged(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the schema of a page of these items: a component `Page_<name>` if the schema of the items is named."""
        page = dict(self._resolved(self.page))
        page["properties"] = {**page["properties"], "items": {"type": "array", "items": item}}
        if "$ref" not in item:
            return page
        name = item["$ref"].removeprefix(_SCHEMAS)
        self.named[f"Page_{name}"] = {**page, "title": f"Page[{name}]"}
        return {"$ref": f"{_SCHEMAS}Page_{name}"}

    def _is_demanded(self, schema: dict[str, Any]) -> bool:
        """Return whether a body is required. A missing body is read as `{}`, which some schemas do not accept."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return all(self._is_demanded(option) for option in schema["anyOf"])
        return bool(schema.get("required")) if schema.get("type", "object") == "object" else True


def _item(kind: Any) -> Any:
    """Return the shape inside a `Page`, or any other type unchanged.

    Pages are not given to msgspec, because it confuses `Page[X]` when two shapes are named X.
    """
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Page else kind


def _described(routes: list[Route], kinds: list[list[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return (schemas, components). The schemas describe `Problem`, the generic `Page` and `kinds`, in this order."""
    try:
        return components([Problem, Page, *chain(*kinds)])
    except (TypeError, KeyError) as error:
        if len(routes) == 1:
            raise TypeError(f"{routes[0].label}: {error}") from None
        for route, each in zip(routes, kinds, strict=True):
            _described([route], [each])
        raise TypeError(f"two shapes of one name in generic shapes: {error}") from None


def _references(value: Any) -> set[str]:
    return set(re.findall(f'"{_SCHEMAS}([^"]+)"', encode(value).decode()))


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter without the null option and default, because parameters cannot be null."""
    schema = {key: each for key, each in schema.items() if (key, each) != ("default", None)}
    options = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    rest = {key: each for key, each in schema.items() if key != "anyOf"}
    return {**rest, **(options[0] if len(options) == 1 else {"anyOf": options} if options else {})}


def _ids(routes: list[Route]) -> list[str]:
    """Return one operation id per route: `<plugin>_<handler>`, with the method or path appended if ambiguous.

    Ids contain the plugin's name, so that installing a plugin does not change the ids of other plugins.
    """
    ids = ["_".join(filter(None, (route.plugin, route.handler.__name__))) for route in routes]
    for suffix in ("method", "path"):
        count = Counter(ids)
        more = [re.sub(r"\W+", "_", getattr(route, suffix).lower()).strip("_") for route in routes]
        ids = [each if count[each] == 1 else f"{each}_{add}" for each, add in zip(ids, more, strict=True)]
    return ids


def _taken(each: _Operation) -> Iterator[str]:
    """Yield the names of the request headers that the operation reads."""
    if each.route.keyed:
        yield "Idempotency-Key"
    if each.signature.if_match is not None:
        yield "If-Match"
    if each.signature.versioned and each.route.method == "GET":
        yield "If-None-Match"
    yield "X-Request-ID"


def _headers(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _successes(each: _Operation) -> dict[str, dict[str, Any]]:
    route, versioned = each.route, each.signature.versioned
    words = {200: "Done.", 201: "Created.", 202: "Accepted; the resource tells the progress.", 204: "Done; no body."}
    more = [*(["ETag"] if versioned else []), *(["Idempotency-Replayed"] if route.keyed else [])]
    adapts = any(typing.get_origin(part) is Answer for part in each.signature.returned)  # its status may differ
    found: dict[str, dict[str, Any]] = {}
    for status in {route.status, *route.also, *((200, 201, 202) if adapts else ())}:
        own = ["Location"] if status in (201, 202) else ["Corral-Affected"] if route.method == "DELETE" else []
        found[str(status)] = {"description": words.get(status, "Done."), "headers": _headers(*ALWAYS, *more, *own)}
        if status != 204 and (content := _content(each)):
            found[str(status)]["content"] = content
    if versioned and route.method == "GET" and not route.live:
        found["304"] = {"description": "The version is the one you have.", "headers": _headers(*ALWAYS, "ETag")}
    return found


def _content(each: _Operation) -> dict[str, Any]:
    """Return the content of a success response by media type.

    The exact media types of texts and streams are known only when they are sent.
    """
    content: dict[str, Any] = {}
    if each.answers:
        content["application/json"] = {"schema": each.answers[0] if len(each.answers) == 1 else {"anyOf": each.answers}}
    if Text in each.signature.returned:
        content["text/*"] = {"schema": {"type": "string"}}
    if Stream in each.signature.returned:
        content |= {"text/event-stream": {"schema": {"type": "string"}}, "*/*": {}}
    return content


class ApiDocument:
    """The OpenAPI document of a running application. The document is generated at first use and cached."""

    def __init__(self, *, title: str, version: str, public_url: str | None) -> None:
        self._facts: dict[str, Any] = {"title": title, "version": version, "public_url": public_url}
        self._routes: list[Route] = []
        self._rendered: bytes | None = None

    def describe(self, routes: Iterable[Route]) -> None:
        """Set the routes that the document describes, and discard the cached document."""
        self._routes, self._rendered = list(routes), None

    def render(self) -> bytes:
        """Return the document as JSON."""
        if self._rendered is None:
            self._rendered = msgspec.json.encode(document(self._routes, **self._facts))
        return self._rendered
