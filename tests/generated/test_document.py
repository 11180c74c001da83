"""The OpenAPI document of all active plugins: what generators of clients and their users need."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.generated.fixtures import PLUGINS
from tests.generated.world import CONFIG

from corral.schema.fields import LINE, UUID
from corral.testing.kit import make_kernel


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    async def read() -> Any:
        async with make_kernel(tmp_path_factory.mktemp("document"), plugins=PLUGINS, config=CONFIG) as kit:
            return (await kit.client.get("/openapi.json")).json()

    return asyncio.run(read())


def schemas(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema and every other object of the document, with its place. Maps of fields are no schemas."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            yield from schemas(each, f"{place}/{index}")
    elif isinstance(node, dict):
        if not place.endswith("/properties"):
            yield place, node
        for key, each in node.items():
            yield from schemas(each, f"{place}/{key}")


def test_arrays_have_items_and_constants_a_type(document: Any) -> None:
    bare = [place for place, schema in schemas(document) if schema.get("type") == "array" and "items" not in schema]
    untyped = [
        place for place, schema in schemas(document) if ("const" in schema or "enum" in schema) and "type" not in schema
    ]
    assert (bare, untyped) == ([], [])


def test_every_field_and_parameter_has_a_description(document: Any) -> None:
    """Name the field in the docstring of its shape, or describe it in `field_descriptions.json` of the plugin."""
    fields = [
        f"{place}: {name}"
        for place, schema in schemas(document)
        for name, each in schema.get("properties", {}).items()
        if not re.fullmatch(r"[A-Z`].+\.", each.get("description", ""))
    ]
    parameters = [
        f"{path}: {each['name']}"
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for each in operation["parameters"]
        if "$ref" not in each and "description" not in each
    ]
    assert (fields, parameters) == ([], [])


def test_every_pattern_says_in_words_what_it_accepts(document: Any) -> None:
    """People who send something else are shown the words, not the regular expression. Use `text_format`."""
    silent = {
        schema["pattern"]: place
        for place, schema in schemas(document["components"]["schemas"])
        if isinstance(schema.get("pattern"), str) and schema["pattern"] not in (LINE, UUID)
        if "patternErrorMessage" not in schema
    }
    assert silent == {}


def test_only_versions_that_are_numbers_are_said_to_grow(document: Any) -> None:
    """The versions of Corral, of plugins and of templates are texts; the glossary knows those of objects."""
    fields = [
        f"{place}: {name}"
        for place, schema in schemas(document)
        for name, each in schema.get("properties", {}).items()
        if name == "version" and each.get("type") == "string" and "grows" in each["description"]
    ]
    assert fields == []


def test_no_field_has_the_name_of_its_shape(document: Any) -> None:
    """Generated clients have a variable of each name in one function."""
    shapes = document["components"]["schemas"].items()
    fields = [(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), shape.get("properties", {})) for name, shape in shapes]
    assert [name for name, properties in fields if name in properties] == []


def test_every_shape_has_a_name_of_its_own(document: Any) -> None:
    """Two shapes of one name are told apart by their modules, with dots, which generators of clients do not accept."""
    assert [name for name in document["components"]["schemas"] if not re.fullmatch(r"\w+", name)] == []


def test_ids_of_operations_and_tags_have_one_style(document: Any) -> None:
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert [each for each in ids if not re.fullmatch(r"[a-z]+(_[a-z]+)+", each)] == []
    assert len(ids) == len(set(ids))
    tags = {tag for operation in operations for tag in operation["tags"]}
    assert [tag for tag in tags if not re.fullmatch(r"[A-Z][A-Za-z]+( [A-Z][a-z]+)*", tag)] == []
    assert sorted(tags) == [each["name"] for each in document["tags"]]
