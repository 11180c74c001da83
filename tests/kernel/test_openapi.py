"""`plugin_admin.service.openapi`: the document of made-up routes, and the problems each may answer."""

from __future__ import annotations

import json
import re
from enum import Enum
from importlib.resources import files
from typing import Annotated, Any, Literal

import click
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from corral import errors
from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Principal
from corral.cli.commands import group
from corral.config.model import Config
from corral.http.answers import Answer, IfMatch, Stream, Text, Wait
from corral.http.handler_signature import read_signature
from corral.http.page import Page, PageQuery
from corral.http.routes import Route, Routes
from corral.plugins.discovery import discover
from corral.schema.fields import Id, Name
from corral_core.plugin_admin.service.openapi import document
from corral_core.plugin_admin.service.openapi_problem_codes import problem_codes


class Priority(Enum):
    LOW = "low"
    HIGH = "high"


class ToolView(msgspec.Struct, kw_only=True):
    """A tool."""

    id: Id
    name: Name
    raw: msgspec.Raw
    anything: Any
    version: int


class NewTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name
    config: dict[str, Any] = {}
    priority: Priority = Priority.LOW


class ToolChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Name | msgspec.UnsetType = msgspec.UNSET


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Square(msgspec.Struct, tag="square"):
    side: float = 1.0


class Queued(msgspec.Struct):
    position: int


class ToolQuery(PageQuery):
    kind: list[Literal["web", "shell"]] | msgspec.UnsetType = msgspec.UNSET
    name: Annotated[str, msgspec.Meta(max_length=5, description="Part of the name.")] | None = None


class Search(msgspec.Struct):
    q: str
    deep: bool = False


routes = Routes("/tools", tag="Tools")


@routes.get("/", needs="tools.read")
def list_tools(query: ToolQuery) -> Page[ToolView]:
    """List tools."""
    raise AssertionError("only the declaration is read")


@routes.post("/", needs="tools.write", status=201, raises=("duplicate", "tools.denied"))
def create_tool(body: NewTool, caller: Principal) -> ToolView:
    """Create a tool.

    Its name is unique.
    """
    raise AssertionError("only the declaration is read")


@routes.get("/{id}", needs=("tools.read", "tools.manage"))
def read_tool(id: str) -> ToolView:
    """Read a tool."""
    raise AssertionError("only the declaration is read")


@routes.patch("/{id}", needs="tools.write")
def change_tool(id: str, body: ToolChange, if_match: IfMatch) -> ToolView:
    """Change a tool."""
    raise AssertionError("only the declaration is read")


@routes.delete("/{id}", needs="tools.write")
def delete_tool(id: str, if_match: IfMatch) -> None:
    """Delete a tool."""


@routes.post("/{tool_id}/runs/{key}", needs=ANY_CALLER, limited=True)
def run_tool(tool_id: str, key: str, body: Circle | Square) -> Answer[Queued] | ToolView | Wait | None:
    """Run a tool."""
    raise AssertionError("only the declaration is read")


@routes.post("/{id}/reveal", needs="tools.manage", keyed=False)
def reveal_tool(id: str) -> Queued:
    """Show what is inside."""
    raise AssertionError("only the declaration is read")


@routes.get("/search", needs=SIGNED_IN)
def search(query: Search) -> list[ToolView]:
    """Search."""
    raise AssertionError("only the declaration is read")


@routes.get("/log", needs="tools.read")
async def tool_log() -> Stream | Text:
    """Follow the log."""
    raise AssertionError("only the declaration is read")


health = Routes("/health", tag="Health")


@health.get("/", needs=PUBLIC, root=True, exempt_host=True)
def show_health() -> dict[str, str]:
    """Is it alive?"""
    raise AssertionError("only the declaration is read")


def made(*more: Route) -> dict[str, Any]:
    return document([*routes, *health, *more], title="Corral", version="1.0", public_url="https://corral.example/")


@pytest.fixture(scope="module", autouse=True)
def _the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(made()).validate()


def operation(label: str, whole: dict[str, Any] | None = None) -> dict[str, Any]:
    method, path = label.split()
    found: dict[str, Any] = (whole or made())["paths"][path][method.lower()]
    return found


def parameters(label: str) -> dict[str, dict[str, Any]]:
    refs = [each for each in operation(label)["parameters"] if "$ref" not in each]
    return {each["name"]: each for each in refs}


def headers_taken(label: str) -> list[str]:
    return [each["$ref"].rpartition("/")[2] for each in operation(label)["parameters"] if "$ref" in each]


def codes(label: str, status: int, whole: dict[str, Any] | None = None) -> list[str]:
    whole = whole or made()
    components = whole["components"]["responses"]
    name = operation(label, whole)["responses"][str(status)]["$ref"].removeprefix("#/components/responses/")
    problem, narrowed = components[name]["content"]["application/problem+json"]["schema"]["allOf"]
    assert problem == {"$ref": "#/components/schemas/Problem"}
    assert {"enum": [status], "type": "integer"}.items() <= narrowed["properties"]["status"].items()
    found: list[str] = narrowed["properties"]["code"]["enum"]
    return found


def answer(label: str, status: int = 200) -> Any:
    return operation(label)["responses"][str(status)]["content"]["application/json"]["schema"]


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    found = made()
    text = json.dumps(found)
    for kind in ("schemas", "responses", "headers", "parameters"):
        for name in found["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, (kind, name)
    assert "ToolQuery" not in found["components"]["schemas"]


def test_the_order_of_routes_does_not_matter() -> None:
    everything = [*routes, *health]
    first = document(everything, title="Corral", version="1", public_url=None)
    second = document(reversed(everything), title="Corral", version="1", public_url=None)
    assert json.dumps(first) == json.dumps(second)
    assert first["servers"] == [{"url": "/"}]
    assert made()["servers"] == [{"url": "https://corral.example"}]


def test_paths_are_below_the_base_and_some_at_the_root() -> None:
    paths = made()["paths"]
    assert list(paths) == sorted(paths)
    assert {"/health", "/api/v1/health", "/api/v1/tools", "/api/v1/tools/{id}"} <= paths.keys()
    assert paths["/health"]["get"]["operationId"] == "show_health_at_root"
    assert list(paths["/api/v1/tools/{id}"]) == ["get", "patch", "delete"]


def test_words_come_from_the_docstring() -> None:
    found = operation("POST /api/v1/tools")
    assert found["summary"] == "Create a tool."
    assert found["description"] == "Its name is unique.\n\nNeeds `tools.write`."
    assert operation("GET /api/v1/tools/{id}")["description"] == "Needs `tools.read` or `tools.manage`."


def test_operation_ids_are_unique_and_bear_the_plugins_name() -> None:
    def handler() -> None:
        """Do."""

    more = Routes("/a", tag="A")
    more.get("/one", needs=PUBLIC)(handler)
    more.put("/one", needs=PUBLIC)(handler)
    more.get("/three", needs=PUBLIC)(handler)
    for each in more:
        each.plugin = "acme"
    found = [each["operationId"] for item in made(*more)["paths"].values() for each in item.values()]
    assert len(found) == len(set(found))
    assert {"acme_handler_put", "acme_handler_get_a_one", "acme_handler_get_a_three"} <= set(found)


def test_path_names_are_ids_or_short_texts() -> None:
    found = parameters("POST /api/v1/tools/{tool_id}/runs/{key}")
    assert found["tool_id"]["schema"] == {"type": "string", "format": "uuid"}
    assert found["key"]["schema"] == {"type": "string", "minLength": 1, "maxLength": 200}
    assert found["key"]["in"] == "path"
    assert found["key"]["required"] is True


def test_query_parameters_are_the_fields_of_the_shape() -> None:
    found = parameters("GET /api/v1/tools")
    assert set(found) == {"limit", "offset", "cursor", "kind", "name"}
    assert found["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert found["kind"]["schema"] == {"type": "array", "items": {"enum": ["web", "shell"], "type": "string"}}
    assert (found["kind"]["style"], found["kind"]["explode"]) == ("form", True)
    assert found["name"]["description"] == "Part of the name."
    assert found["name"]["schema"] == {"type": "string", "maxLength": 5}
    required = {name: each["required"] for name, each in parameters("GET /api/v1/tools/search").items()}
    assert required == {"q": True, "deep": False}


def test_headers_that_are_read() -> None:
    assert headers_taken("POST /api/v1/tools") == ["Idempotency-Key", "X-Request-ID"]
    assert headers_taken("GET /api/v1/tools/{id}") == ["If-None-Match", "X-Request-ID"]
    assert headers_taken("PATCH /api/v1/tools/{id}") == ["If-Match", "X-Request-ID"]
    assert headers_taken("GET /api/v1/tools") == ["X-Request-ID"]


def test_a_disclosure_has_no_key() -> None:
    label = "POST /api/v1/tools/{id}/reveal"
    assert headers_taken(label) == ["X-Request-ID"]
    assert "409" not in operation(label)["responses"]
    assert codes(label, 422) == ["validation_error"]
    assert "Idempotency-Replayed" not in operation(label)["responses"]["200"]["headers"]


def test_a_body_is_required_where_a_field_is() -> None:
    assert operation("POST /api/v1/tools")["requestBody"]["required"] is True
    assert operation("PATCH /api/v1/tools/{id}")["requestBody"]["required"] is False
    assert operation("POST /api/v1/tools/{tool_id}/runs/{key}")["requestBody"]["required"] is True
    assert "requestBody" not in operation("DELETE /api/v1/tools/{id}")


def test_a_page_has_a_component_of_its_own() -> None:
    assert answer("GET /api/v1/tools") == {"$ref": "#/components/schemas/Page_ToolView"}
    page = made()["components"]["schemas"]["Page_ToolView"]
    assert page["required"] == ["items", "total", "limit", "offset", "next"]
    items = {"type": "array", "items": {"$ref": "#/components/schemas/ToolView"}, "description": "The items."}
    assert page["properties"]["items"] == items


def test_unknown_json_has_an_empty_schema() -> None:
    tool = made()["components"]["schemas"]["ToolView"]["properties"]
    assert tool["raw"] == {}
    assert tool["anything"] == {}


def test_answers_with_version_have_an_etag_and_304() -> None:
    found = operation("GET /api/v1/tools/{id}")["responses"]
    assert "ETag" in found["200"]["headers"]
    assert "ETag" in found["304"]["headers"]
    assert "content" not in found["304"]
    assert "304" not in operation("PATCH /api/v1/tools/{id}")["responses"]
    assert "304" not in operation("GET /api/v1/tools")["responses"]


def test_created_answers_say_where() -> None:
    found = operation("POST /api/v1/tools")["responses"]["201"]
    assert {"Location", "ETag", "X-Request-ID", "Idempotency-Replayed"} <= found["headers"].keys()
    gone = operation("DELETE /api/v1/tools/{id}")["responses"]
    assert "content" not in gone["204"]
    assert "Corral-Affected" in gone["204"]["headers"]
    assert "200" not in gone


def test_a_union_of_untagged_shapes_is_an_alternative_and_an_answer_may_have_another_status() -> None:
    label = "POST /api/v1/tools/{tool_id}/runs/{key}"
    options = [{"$ref": "#/components/schemas/Queued"}, {"$ref": "#/components/schemas/ToolView"}, {"type": "null"}]
    for status in (200, 201, 202):
        assert answer(label, status) == {"anyOf": options}


def test_streams_and_texts() -> None:
    content = operation("GET /api/v1/tools/log")["responses"]["200"]["content"]
    assert set(content) == {"text/event-stream", "text/*", "*/*"}


def test_security() -> None:
    assert operation("GET /health")["security"] == []
    assert operation("GET /api/v1/tools")["security"] == [{"bearer": []}, {"apiKey": []}]
    assert set(made()["components"]["securitySchemes"]) == {"bearer", "apiKey"}


def test_problems_are_narrowed_by_status() -> None:
    assert codes("POST /api/v1/tools", 409) == ["duplicate", "idempotency_in_progress"]
    assert codes("POST /api/v1/tools", 422) == ["idempotency_key_reused", "validation_error"]
    assert codes("GET /api/v1/tools", 422) == ["invalid_cursor", "validation_error"]
    assert codes("GET /api/v1/tools/{id}", 404) == ["not_found"]
    assert codes("DELETE /api/v1/tools/{id}", 412) == ["precondition_failed"]
    assert codes("GET /api/v1/tools", 400) == ["invalid_host", "malformed_json", "malformed_request"]
    assert codes("GET /health", 400) == ["malformed_json", "malformed_request"]
    assert codes("GET /health", 403) == ["ip_blocked"]
    assert "401" not in operation("GET /health")["responses"]
    assert "412" not in operation("GET /api/v1/tools/{id}")["responses"]


def test_what_a_permission_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(errors.CODES, "lab.limited", errors.Code(403, "Limited"))
    monkeypatch.setattr("corral_core.plugin_admin.service.openapi_problem_codes.LIMITING_CODES", {"lab.limited"})
    everything = {"forbidden", "insufficient_scope", "ip_blocked", "lab.limited"}
    assert set(codes("GET /api/v1/tools", 403)) == everything
    assert codes("POST /api/v1/tools/{tool_id}/runs/{key}", 403) == ["forbidden", "ip_blocked"]  # who only registers


@pytest.mark.parametrize("route", [*routes, *health], ids=lambda route: route.label)
def test_the_document_has_exactly_the_problems_of_the_route(route: Route) -> None:
    label = f"{route.method} /api/v1{route.path}"
    wanted, whole = problem_codes(route, read_signature(route)), made()
    assert {status: set(codes(label, status, whole)) for status in wanted} == wanted
    refused = {int(status) for status in operation(label, whole)["responses"] if int(status) >= 400}
    assert refused == wanted.keys()
    assert all(errors.CODES[code][0] == status for status, found in wanted.items() for code in found)


def test_a_plugins_own_code_counts_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tools.denied" not in codes("POST /api/v1/tools", 409)
    monkeypatch.setitem(errors.CODES, "tools.denied", errors.Code(409, "Denied"))
    assert "tools.denied" in codes("POST /api/v1/tools", 409)


def codes_of_the_product() -> dict[str, errors.Code]:
    """The codes of the kernel and of all plugins that belong to the distribution."""
    for plugin in discover(Config()):
        if plugin.built_in:
            plugin.load()
    return errors.CODES


def test_every_code_of_the_product_has_a_remedy() -> None:
    found = codes_of_the_product()
    assert len(found) > 80
    assert [code for code, each in found.items() if len(each.remedy) < 20 or each.remedy[-1] != "."] == []


def test_the_commands_in_remedies_exist() -> None:
    named = {
        command
        for found in codes_of_the_product().values()
        for command in re.findall(r"`corral ([^`]*)`", found.remedy)
    }
    assert len(named) > 5
    for command in named:
        found: Any = group
        for word in command.split():
            if not isinstance(found, click.Group):
                break  # what follows a command are its arguments
            found = found.get_command(click.Context(found), word)
            assert found is not None, command


def test_a_code_has_one_meaning() -> None:
    errors.declare_codes({"duplicate": errors.CODES["duplicate"]})  # the same again is no conflict
    with pytest.raises(ValueError, match="duplicate is already declared"):
        errors.declare_codes({"duplicate": (422, "Twice")})


def test_shapes_of_one_name_are_kept_apart() -> None:
    class Problem(msgspec.Struct):
        mine: int

    own = msgspec.defstruct("ToolView", [("other", int)], module="elsewhere")
    more = Routes("/b", tag="B")

    def one() -> Problem:
        raise AssertionError("only the declaration is read")

    def two() -> Page[Any]:
        raise AssertionError("only the declaration is read")

    one.__annotations__["return"] = Problem
    two.__annotations__["return"] = Page[own]  # type: ignore[valid-type]  # made at run time
    more.get("/one", needs=PUBLIC)(one)
    more.get("/two", needs=PUBLIC)(two)
    found = made(*more)
    OpenAPIV31SpecValidator(found).validate()
    schemas = found["components"]["schemas"]
    pages = {name for name in schemas if name.startswith("Page_")}
    assert pages == {"Page_elsewhere.ToolView", f"Page_{__name__}.ToolView"}
    items = schemas["Page_elsewhere.ToolView"]["properties"]["items"]["items"]
    assert items == {"$ref": "#/components/schemas/elsewhere.ToolView"}
    assert schemas["elsewhere.ToolView"]["properties"] == {"other": {"type": "integer"}}
    assert any(each.get("properties", {}).keys() == {"mine"} for each in schemas.values())


def test_what_cannot_be_described_is_an_error_that_names_the_route() -> None:
    more = Routes("/c", tag="C")

    def broken() -> list[Any]:
        raise AssertionError("only the declaration is read")

    broken.__annotations__["return"] = list[Queued | ToolView]
    more.get("/broken", needs=PUBLIC)(broken)
    with pytest.raises(TypeError, match=r"GET /c/broken"):
        made(*more)


def test_the_documentation_page_asks_nobody_else_and_has_nothing_inline() -> None:
    folder = files("corral_core.plugin_admin.api_docs")
    page, script, style = (folder.joinpath(name).read_text() for name in ("index.html", "docs.js", "docs.css"))
    for text in (page, script, style):
        assert not re.search(r"https?://|@import|\burl\(|innerHTML|\beval\b", text)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page)
    assert re.findall(r'(?:src|href)="([^"]+)"', page) == [
        "/api/v1/",
        "data:,",
        "docs/docs.css",
        "docs/docs.js",
        "openapi.json",
    ]
