"""Fills in parameters, references and secret names in the specs of a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from corral.errors import FieldError, Invalid
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.marketplace.service.manifest_traversal import SECRET, reference_key, texts

Json = dict[str, Any]
_PARAMETER = re.compile(r"\{\{\s*params\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_TEMPLATE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_MENTIONS = re.compile(r"(?<![\w.\"'])params\s*[.\[]")


def default_parameters(schema: Json) -> Json:
    """Return the default values of the parameters that have one, keyed by parameter name."""
    return {name: each["default"] for name, each in schema.get("properties", {}).items() if "default" in each}


def complete_parameters(schema: Json, given: Json) -> Json:
    """Return the given parameters, completed with the schema's default values.

    Raise `Invalid` if the parameters do not match the schema, or if a string contains `{{`, because the resources would
    later evaluate the string as an expression.
    """
    properties: Json = schema.get("properties", {})
    found = default_parameters(schema) | given
    faults = json_schema_errors(schema, found, pointer_prefix="/parameters")
    faults += [
        FieldError(f"/parameters/{name}", "unknown_field", "unknown parameter") for name in given.keys() - properties
    ]
    faults += [
        FieldError(place.pointer, "not_allowed", "must not contain {{, which begins an expression")
        for place in texts(found, "/parameters")
        if "{{" in place.value
    ]
    if faults:
        raise Invalid(faults[0].detail, errors=faults)
    return found


def parameter_faults(value: Any, known: set[str], pointer: str) -> Iterator[FieldError]:
    """Yield a fault for each placeholder of an unknown parameter, and for each other expression that uses a parameter.

    A placeholder contains nothing but the parameter: `{{ params.name }}`.
    """
    for place in texts(value, pointer):
        for match in _TEMPLATE.finditer(place.value):
            exact = _PARAMETER.fullmatch(match[0])
            if exact is not None and exact[1] not in known:
                yield FieldError(place.pointer, "unknown_reference", f"The template has no parameter {exact[1]}.")
            elif exact is None and _MENTIONS.search(match[1]):
                detail = "A parameter must stand alone in its braces, such as {{ params.name }}."
                yield FieldError(place.pointer, "not_allowed", detail)


def with_parameters(value: Any, parameters: Mapping[str, Any]) -> Any:
    """Return a value with its parameters filled in.

    A string that consists only of a parameter's placeholder is replaced by the parameter's value, which keeps its type.
    """
    if isinstance(value, str):
        exact = _PARAMETER.fullmatch(value)
        if exact is not None:
            return parameters.get(exact[1])
        return _PARAMETER.sub(lambda match: _as_text(parameters.get(match[1])), value)
    if isinstance(value, dict):
        return {name: with_parameters(item, parameters) for name, item in value.items()}
    return [with_parameters(item, parameters) for item in value] if isinstance(value, list) else value


def with_secrets(value: Any, names: Mapping[str, str]) -> Any:
    """Return a value in which the template's secret names are replaced by the names in the vault."""
    if isinstance(value, str):
        return SECRET.sub(lambda match: f"{{{{ secrets.{names.get(match[1], match[1])} }}}}", value)
    if isinstance(value, dict):
        return {name: with_secrets(item, names) for name, item in value.items()}
    return [with_secrets(item, names) for item in value] if isinstance(value, list) else value


def with_ids(value: Any, ids: Mapping[str, str]) -> Any:
    """Return a value in which references to resources are replaced by the ids of their objects."""
    key = reference_key(value)
    if key is not None:
        return ids[key]
    if isinstance(value, dict):
        return {name: with_ids(item, ids) for name, item in value.items()}
    return [with_ids(item, ids) for item in value] if isinstance(value, list) else value


def with_references(value: Any, keys: Mapping[str, str]) -> Any:
    """Return a value in which object ids are replaced by references to resources. This is the inverse of `with_ids`."""
    if isinstance(value, str):
        return {"$ref": keys[value]} if value in keys else value
    if isinstance(value, dict):
        return {name: with_references(item, keys) for name, item in value.items()}
    return [with_references(item, keys) for item in value] if isinstance(value, list) else value


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
