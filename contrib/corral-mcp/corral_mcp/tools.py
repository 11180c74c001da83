"""The tools that Corral offers to MCP clients. They are API operations, described as in the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

Json = dict[str, Any]
API = "/api/v1"
OPERATIONS = {
    "agents": ("list_agents", "get_agent", "create_agent", "start_agent", "stop_agent"),
    "tasks": (
        *("list_tasks", "get_task", "create_task", "cancel_task", "retry_task", "give_task_input", "explain_task"),
        "list_task_logs",
    ),
    "approvals": ("list_approvals", "get_approval", "approve_request", "reject_request", "request_revision"),
}
"""The ids of the operations that Corral offers to MCP clients, grouped by plugin.

An operation that this installation does not serve is not offered.
"""
_COMPONENT = "#/components/schemas/"
_NAME = re.compile(r"\{([a-z_]+)\}")


class ApiTool(msgspec.Struct, frozen=True, kw_only=True):
    """An API operation that is offered as a tool.

    The tool's arguments are the path parameters, the query parameters and the fields of the request body.
    """

    name: str
    description: str
    schema: Json
    method: str
    path: str
    query_names: tuple[str, ...]
    takes_body: bool

    @property
    def is_read_only(self) -> bool:
        """Whether the operation changes nothing."""
        return self.method == "GET"

    def split(self, arguments: Mapping[str, Any]) -> tuple[str, Json, Json]:
        """Split the arguments into the path, the query and the body of the request."""
        rest = dict(arguments)
        in_path = {name: str(rest.pop(name, "-")).replace("/", "-") for name in _NAME.findall(self.path)}
        query = {name: rest.pop(name) for name in self.query_names if name in rest}
        if not self.takes_body:
            query, rest = query | rest, {}  # the API names what it does not know
        return API + self.path.format_map(in_path), query, rest


def api_tools(document: Json) -> dict[str, ApiTool]:
    """Return the tools that the OpenAPI document describes."""
    operations = {
        operation["operationId"]: (method, path.removeprefix(API), operation)
        for path, methods in document["paths"].items()
        if path.startswith(API)
        for method, operation in methods.items()
    }
    return {
        name: _create_tool(document, name, *operations[f"{plugin}_{name}"])
        for plugin, names in OPERATIONS.items()
        for name in names
        if f"{plugin}_{name}" in operations
    }


def _create_tool(document: Json, name: str, method: str, path: str, operation: Json) -> ApiTool:
    given = [each for each in operation["parameters"] if each.get("in") in ("path", "query")]
    properties: Json = {}
    for each in given:
        described = {"description": each["description"]} if "description" in each else {}
        properties[each["name"]] = {**each["schema"], **described}
    required = [each["name"] for each in given if each.get("required")]
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {}).get("schema")
    if body is not None:
        shape = _resolved(document, body)
        properties = {**shape.get("properties", {}), **properties}
        required += shape.get("required", [])
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = sorted(set(required))
    return ApiTool(
        name=name,
        description="\n\n".join(filter(None, (operation["summary"], operation["description"]))),
        schema=_with_components(document, schema),
        method=method.upper(),
        path=path,
        query_names=tuple(each["name"] for each in given if each["in"] == "query"),
        takes_body=body is not None,
    )


def _resolved(document: Json, schema: Json) -> Json:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].removeprefix(_COMPONENT)]
    return schema


def _with_components(document: Json, schema: Json) -> Json:
    """Return the schema together with the components to which it refers."""
    definitions: Json = {}
    new = set(_references(schema))
    while new:
        name = new.pop()
        definitions[name] = document["components"]["schemas"][name]
        new |= set(_references(definitions[name])) - definitions.keys()
    if definitions:
        schema = {**schema, "$defs": definitions}
    text = msgspec.json.encode(schema).replace(_COMPONENT.encode(), b"#/$defs/")
    found: Json = msgspec.json.decode(text)
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref" and isinstance(each, str):
                yield each.removeprefix(_COMPONENT)
            else:
                yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)
