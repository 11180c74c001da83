"""Values that a JSON Schema of the OpenAPI document takes: the least that is demanded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from corral.ids import new_id

_SCHEMAS = "#/components/schemas/"
_FORMATS = {"date-time": "2999-01-01T00:00:00Z", "date": "2999-01-01", "uuid": "01890a5d-ac96-774b-bcce-b302099a8057"}
# Tried in this order where a pattern is to be met: words, addresses, times, codes.
_TEXTS = (
    "x",
    "en",
    "sample",
    "sample.name",
    "01890a5d-ac96-774b-bcce-b302099a8057",
    "123456",
    "a@example.org",
    "0 0 * * *",
    "https://example.org",
    "192.0.2.0/24",
    "a" * 64,
)


class Samples:
    """Samples by the schemas of one document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]

    def resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema behind references."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].removeprefix(_SCHEMAS)]
        return schema

    def of(self, schema: Mapping[str, Any]) -> Any:
        """A value with nothing that may be left out."""
        schema = self.resolved(schema)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                options = [self.resolved(each) for each in schema[key]]
                return self.of(next((each for each in options if each.get("type") != "null"), options[0]))
        if "examples" in schema:
            return schema["examples"][0]
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type")
        kind = next((each for each in kind if each != "null"), None) if isinstance(kind, list) else kind
        match kind:
            case "object":
                properties = schema.get("properties", {})
                return {name: self.of(properties.get(name, {})) for name in schema.get("required", ())}
            case "array":
                return [self.of(schema.get("items", {})) for _ in range(schema.get("minItems", 0))]
            case "integer" | "number":
                return schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema))
            case "boolean":
                return False
            case "string":
                return _text(schema)
        return {}

    @staticmethod
    def nothing(name: str) -> str:
        """What a path may have in this place and nothing is called."""
        return new_id() if name == "id" or name.endswith("_id") else "nothing-has-this-name"


def _text(schema: Mapping[str, Any]) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    pattern, least, most = schema.get("pattern"), schema.get("minLength", 0), schema.get("maxLength", 10**6)
    for text in _TEXTS:
        for each in (text, text.ljust(least, "x")):
            if least <= len(each) <= most and (pattern is None or re.search(pattern, each)):
                return each
    raise AssertionError(f"no sample fits {schema}: add one to {__name__}")
