"""Generates the OpenAPI 3.1 document for all declared routes, including the problems that each route may return.

The document is complete: it describes every status, problem code and schema that a response can contain. Routes declare
their own problem codes in `raises`.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

import msgspec

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN
from corral.errors import CODES, FieldError
from corral.http.answers import Answer, Stream, Text
from corral.http.handler_signature import Signature, page_item_type, read_signature, shape_schemas
from corral.http.page import Page
from corral.http.routes import API_PREFIX, Route, ServedRoutes
from corral.plugin import InstallationConfig
from corral.schema.conversion import encode
from corral_core.plugin_admin.service.openapi_descriptions import FieldDescriptions, describe_field, describe_name
from corral_core.plugin_admin.service.openapi_enum_order import enum_orders, reorder
from corral_core.plugin_admin.service.openapi_problem_codes import EVERY_ROUTE, problem_codes

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_SCHEMAS = "#/components/schemas/"
JSON, FORM, MULTIPART = "application/json", "application/x-www-form-urlencoded", "multipart/form-data"

ALWAYS = ("X-Request-ID", "Cache-Control", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
_NEEDS = {PUBLIC: "no credential", SIGNED_IN: "a signed-in user", ANY_CALLER: "any valid credential"}
WITH_STATUS = {401: "WWW-Authenticate", 405: "Allow", 409: "Retry-After", 429: "Retry-After", 503: "Retry-After"}
SUCCESSES = {
    200: "Done.",
    201: "Created.",
    202: "Accepted. Read the resource to see the progress.",
    204: "Done. The response has no body.",
    206: "The requested part of the file.",
}
JSON_TYPES: dict[type, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    types.NoneType: "null",
}
CREDENTIALS: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]


class Problem(msgspec.Struct, kw_only=True):
    """The problem document of a failed request (RFC 9457). Some codes add members, such as `current_status`."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: Annotated[list[FieldError], msgspec.Meta(max_length=100)] | msgspec.UnsetType = msgspec.UNSET


def document(routes: Iterable[Route], *, title: str, version: str, public_url: str | None) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document for the routes. The result does not depend on the order of the routes.

    Raise `TypeError` with the route's name if its handler, or a type in its requests or responses, cannot be described.
    """
    writer = _Writer(sorted(routes, key=lambda route: (route.path, METHODS.index(route.method))))
    found: dict[str, Any] = json.loads(files("corral_core.plugin_admin.api_docs").joinpath("frame.json").read_bytes())
    found["info"] |= {"title": title, "version": version}
    found["servers"] = [{"url": public_url.rstrip("/") if public_url else "/"}]
    found["tags"] = [{"name": tag} for tag in sorted({route.tag for route, _ in writer.operations})]
    found["paths"] = writer.paths()
    found["components"]["schemas"] = writer.schemas(found["paths"])
    found["components"]["responses"] = dict(sorted(writer.responses.items()))
    return found


class _Writer:
    """Writes the operations of the document, and collects the components that several operations use.

    `described` maps types to their schemas.
    """

    def __init__(self, routes: list[Route]) -> None:
        self.responses: dict[str, dict[str, Any]] = {}
        self.operations = [(route, route.signature or read_signature(route)) for route in routes]
        described, named = shape_schemas(self.operations, Problem, Page)
        orders = dict(enum_orders(described, set()))
        self.described: dict[Any, dict[str, Any]] = {
            kind: complete_schema(reorder(schema, orders)) for kind, schema in described.items()
        }
        self.named: dict[str, dict[str, Any]] = {
            name: complete_schema(reorder(schema, orders)) for name, schema in named.items()
        }
        descriptions = FieldDescriptions(described)
        for name, schema in self.named.items():
            descriptions.add_to(name, schema)

    def paths(self) -> dict[str, dict[str, Any]]:
        """Return all operations, keyed by path and method. A route with two paths is included under both."""
        found: dict[str, dict[str, Any]] = {}
        for name, (route, signature) in zip(
            _operation_ids([route for route, _ in self.operations]), self.operations, strict=True
        ):
            written = self._operation(route, signature)
            for path in route.paths:
                own = {"operationId": name if path.startswith(API_PREFIX) else f"{name}_at_root"}
                found.setdefault(path, {})[route.method.lower()] = {**own, **written}
        return dict(sorted(found.items()))

    def schemas(self, paths: Any) -> dict[str, Any]:
        """Return the schema components that paths and responses reference.

        Query types are described as parameters, not as components.
        """
        found: dict[str, Any] = {}
        new: Any = [paths, self.responses]
        while names := set(re.findall(f'"{_SCHEMAS}([^"]+)"', encode(new).decode())) - found.keys():
            new = {name: self.named[name] for name in names}
            found |= new
        return dict(sorted(found.items()))

    def _operation(self, route: Route, signature: Signature) -> dict[str, Any]:
        needs = f"Needs {' or '.join(_NEEDS.get(need, f'`{need}`') for need in route.needs)}."
        headers = [{"$ref": f"#/components/parameters/{name}"} for name in _headers_read(route, signature)]
        written: dict[str, Any] = {
            "tags": [route.tag],
            "summary": route.summary,
            "description": "\n\n".join(filter(None, (route.description, needs))),
            "parameters": [*self._parameters(route, signature), *headers],
        }
        if signature.body is not None:
            body = {} if signature.body is bytes else self.described[signature.body]
            written["requestBody"] = {
                "description": f"The body may have at most {route.body_limit // 1024} KiB.",
                "required": self._is_body_required(body),
                "content": {
                    media: {"schema": {"type": "object"} if signature.body is bytes and media == FORM else body}
                    for media in _media_types(route, signature)
                },
            }
        responses = self._successes(route, signature)
        for status, codes in problem_codes(route, signature).items():
            refusal = self._problem_response(status, sorted(codes))
            own = responses.get(str(status))  # such as 503 of the check of readiness, which is no problem document
            responses[str(status)] = refusal if own is None else self._body_or_problem(own, refusal)
        written["responses"] = dict(sorted(responses.items()))
        is_public = PUBLIC in route.needs
        is_open = is_public and "unauthenticated" not in route.raises  # the others read a credential if there is one
        written["security"] = [] if is_open else [*([{}] if is_public else []), *CREDENTIALS]
        return written

    def _parameters(self, route: Route, signature: Signature) -> Iterator[dict[str, Any]]:
        for name in route.path_parameters:
            is_id = name == "id" or name.endswith("_id")
            schema = {"type": "string", **({"format": "uuid"} if is_id else {"minLength": 1, "maxLength": 200})}
            text = describe_name(name, route.handler.__module__)
            described = {} if text is None else {"description": text}
            yield {"name": name, "in": "path", "required": True, **described, "schema": schema}
        shape = self._resolve_reference(self.described[signature.query])
        for name, schema in shape.get("properties", {}).items():
            schema = _without_null(schema)
            found: dict[str, Any] = {"name": name, "in": "query", "required": name in shape.get("required", ())}
            if "description" in schema:
                found["description"] = schema.pop("description")
            if self._resolve_reference(schema).get("type") == "array":
                found |= {"style": "form", "explode": True}
            yield {**found, "schema": schema}

    def _successes(self, route: Route, signature: Signature) -> dict[str, dict[str, Any]]:
        versioned = signature.returns_version
        more = [*(["ETag"] if versioned else []), *(["Idempotency-Replayed"] if route.keyed else [])]
        adapts = any(typing.get_origin(part) is Answer for part in signature.returned)  # its status may differ
        found: dict[str, dict[str, Any]] = {}
        for status in {route.status, *route.also, *((200, 201, 202) if adapts else ())}:
            own = ["Location"] if status in (201, 202) else ["Corral-Affected"] if route.method == "DELETE" else []
            headers = _header_references(*ALWAYS, *more, *own)
            found[str(status)] = {"description": SUCCESSES.get(status, "Done."), "headers": headers}
            if status != 204 and (content := self._content(signature)):
                found[str(status)]["content"] = content
        if 206 in route.also or (versioned and route.method == "GET" and not route.live):
            found["304"] = {
                "description": "The client already has this version.",
                "headers": _header_references(*ALWAYS, "ETag"),
            }
        return found

    def _content(self, signature: Signature) -> dict[str, Any]:
        """Return the schemas of a successful response, keyed by media type.

        A `Text` is listed as `text/*`, and a `Stream` as `text/event-stream` and `*/*`, because the actual types are
        known only at run time.
        """
        schemas = [self._result_schema(kind) for kind in signature.answers]
        schemas += [{"type": "null"}] if types.NoneType in signature.returned else []
        content: dict[str, Any] = {}
        if schemas:
            content["application/json"] = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
        if Text in signature.returned:
            content["text/*"] = {"schema": {"type": "string"}}
        if Stream in signature.returned:
            content |= {"text/event-stream": {"schema": {"type": "string"}}, "*/*": {}}
        return content

    def _result_schema(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type that a handler returns.

        The schema of a page is the component `Page_<name>` if the schema of its items has a name.
        """
        item = self.described[page_item_type(kind)]
        if page_item_type(kind) is kind:
            return item
        page = dict(self._resolve_reference(self.described[Page]))
        page["properties"] = {**page["properties"], "items": {**page["properties"]["items"], "items": item}}
        if "$ref" not in item:
            return page
        name = item["$ref"].removeprefix(_SCHEMAS)
        self.named[f"Page_{name}"] = {**page, "title": f"Page[{name}]"}
        return {"$ref": f"{_SCHEMAS}Page_{name}"}

    def _problem_response(self, status: int, codes: list[str]) -> dict[str, str]:
        own = (code for code in codes if code not in EVERY_ROUTE or CODES[code][0] != status)
        name = ".".join((str(status), *own))
        values: dict[str, Any] = {"status": {"enum": [status]}, "code": {"enum": codes}}
        described = {name: {**value, "description": describe_field(Problem, name)} for name, value in values.items()}
        narrowed = complete_schema({"properties": described})
        self.responses[name] = {
            "description": "; ".join(dict.fromkeys(CODES[code][1] for code in codes)) + ".",
            "headers": _header_references(*ALWAYS, *([WITH_STATUS[status]] if status in WITH_STATUS else ())),
            "content": {"application/problem+json": {"schema": {"allOf": [self.described[Problem], narrowed]}}},
        }
        return {"$ref": f"#/components/responses/{name}"}

    def _body_or_problem(self, own: dict[str, Any], refusal: dict[str, str]) -> dict[str, Any]:
        """Return a response whose content is either the body in `own` or the problem document in `refusal`."""
        other = self.responses[refusal["$ref"].removeprefix("#/components/responses/")]
        return {**own, "description": other["description"], "content": {**own["content"], **other["content"]}}

    def _resolve_reference(self, schema: dict[str, Any]) -> dict[str, Any]:
        return (
            self._resolve_reference(self.named[schema["$ref"].removeprefix(_SCHEMAS)]) if "$ref" in schema else schema
        )

    def _is_body_required(self, schema: dict[str, Any]) -> bool:
        """Return whether a body is required. A missing body is treated as `{}`, which some schemas do not accept."""
        schema = self._resolve_reference(schema)
        if "anyOf" in schema:
            return all(self._is_body_required(option) for option in schema["anyOf"])
        return bool(schema.get("required")) if schema.get("type", "object") == "object" else True


def _media_types(route: Route, signature: Signature) -> tuple[str, ...]:
    """Return the media types of a request body. A raw body may be JSON or a form."""
    if signature.body is bytes:
        return (JSON, FORM)
    return (MULTIPART if route.multipart is not None else FORM if route.form else JSON,)


def complete_schema(schema: Any) -> Any:
    """Return the schema with additions that client generators need, although JSON Schema does not require them.

    Arrays get `items`, free-form objects get `additionalProperties`, and constants and enumerations get a `type`.
    """
    if isinstance(schema, list):
        return [complete_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: complete_schema(each) for key, each in schema.items() if key != "properties"}
    if "properties" in schema:  # a map whose keys are names of fields, not keywords
        done["properties"] = {name: complete_schema(each) for name, each in schema["properties"].items()}
    if done.get("type") == "array":
        done.setdefault("items", {})
    if done.get("type") == "object" and "properties" not in done:
        done.setdefault("additionalProperties", True)
    if values := [schema["const"]] if "const" in schema else schema.get("enum") if "type" not in schema else None:
        types = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values if type(value) in JSON_TYPES))
        done.setdefault("type", types[0] if len(types) == 1 else types)
    return done


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter, without `null` as a type or as the default.

    Query parameters cannot be null.
    """
    schema = {key: each for key, each in schema.items() if (key, each) != ("default", None)}
    options = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    rest = {key: each for key, each in schema.items() if key != "anyOf"}
    return {**rest, **(options[0] if len(options) == 1 else {"anyOf": options} if options else {})}


def _operation_ids(routes: list[Route]) -> list[str]:
    """Return an operation id for each route: `<plugin>_<handler>`, with the method or path appended to make ids unique.

    Ids contain the plugin's name, so that installing a plugin does not change the ids of other plugins.
    """
    ids = ["_".join(filter(None, (route.plugin, route.handler.__name__))) for route in routes]
    for suffix in ("method", "path"):
        count = Counter(ids)
        more = [re.sub(r"\W+", "_", getattr(route, suffix).lower()).strip("_") for route in routes]
        ids = [each if count[each] == 1 else f"{each}_{add}" for each, add in zip(ids, more, strict=True)]
    return ids


def _headers_read(route: Route, signature: Signature) -> Iterator[str]:
    """Yield the names of the request headers that the operation reads."""
    if route.keyed:
        yield "Idempotency-Key"
    if signature.if_match is not None:
        yield "If-Match"
    if signature.returns_version and route.method == "GET":
        yield "If-None-Match"
    yield "X-Request-ID"


def _header_references(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


class OpenApiDocument:
    """Implements `corral.plugin.ApiDocument`. The document is generated on first use and cached."""

    def __init__(self, served: ServedRoutes, installation: InstallationConfig) -> None:
        self._served, self._public_url = served, installation.public_url
        self._described: Sequence[Route] = ()
        self._rendered = b""

    def render(self) -> bytes:
        routes = self._served.routes
        if not self._rendered or routes is not self._described:
            found = document(routes, title="Corral", version=version("corral"), public_url=self._public_url)
            self._described, self._rendered = routes, msgspec.json.encode(found)
        return self._rendered
