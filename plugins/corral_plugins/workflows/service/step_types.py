"""The registry of step types: the engine's own control steps, and the types that plugins contribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.plugin import Contributions
from corral_plugins.workflows.api import StepType

Json = dict[str, Any]

NAME = {
    "type": "string",
    "pattern": "^[a-z][a-z0-9_]{0,62}$",
    "patternErrorMessage": "1 to 63 characters of a-z, 0-9 and _, beginning with a letter",
}
NAMES = {"type": "array", "items": NAME, "maxItems": 50}
STEPS = {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": 50}


def object_schema(properties: Json, *required: str) -> Json:
    """Return a JSON Schema for a configuration object with these properties.

    `required` names the required properties.
    """
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


EVENT = object_schema(
    {
        "event": {"type": "string", "minLength": 1, "maxLength": 100},
        "filter": {"type": "string", "minLength": 1, "maxLength": 4096},
        "timeout_seconds": {"type": "integer", "minimum": 1, "maximum": 2_592_000},
    },
    "event",
)
CONTROL_TYPES = (
    StepType(
        type="condition",
        title="Choose between two paths",
        schema=object_schema(
            {"expression": {"type": "string", "minLength": 1, "maxLength": 4096}, "if_true": NAMES, "if_false": NAMES},
            "expression",
        ),
        output_schema=object_schema({"result": {"type": "boolean"}}, "result"),
    ),
    StepType(
        type="switch",
        title="Choose among several paths",
        schema=object_schema(
            {
                "value": {},
                "cases": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 50,
                    "items": object_schema({"equals": {}, "steps": NAMES}, "equals", "steps"),
                },
                "default": NAMES,
            },
            "value",
            "cases",
        ),
        output_schema=object_schema({"case": {"type": ["integer", "null"]}}, "case"),
    ),
    StepType(
        type="parallel",
        title="Run branches at the same time",
        schema=object_schema(
            {
                "branches": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 50,
                    "items": object_schema({"name": NAME, "steps": STEPS}, "name", "steps"),
                },
                "join": {"anyOf": [{"enum": ["all", "any"]}, {"type": "integer", "minimum": 1, "maximum": 50}]},
            },
            "branches",
        ),
    ),
    StepType(
        type="loop",
        title="Repeat steps",
        schema=object_schema(
            {
                "items": {"type": "array", "maxItems": 1000},
                "while": {"type": "string", "minLength": 1, "maxLength": 4096},
                "body": STEPS,
                "max_iterations": {"type": "integer", "minimum": 1, "maximum": 1000},
                "concurrency": {"type": "integer", "minimum": 1, "maximum": 50},
                "on_item_error": {"enum": ["fail", "collect"]},
            },
            "body",
        )
        | {"oneOf": [{"required": ["items"]}, {"required": ["while"]}]},
        output_schema=object_schema({"results": {"type": "array"}, "errors": {"type": "array"}}, "results", "errors"),
    ),
    StepType(
        type="wait",
        title="Wait for time or for an event",
        schema=object_schema(
            {
                "seconds": {"type": "number", "minimum": 0, "maximum": 31_536_000},
                "until": {"type": "string", "format": "date-time", "maxLength": 64},
                "event": EVENT,
            }
        )
        | {"minProperties": 1, "maxProperties": 1},
        waits=True,
    ),
    StepType(type="transform", title="Compute a value", schema=object_schema({"value": {}}, "value")),
)


class StepTypes:
    """Finds step types by name."""

    def __init__(self, contributions: Contributions) -> None:
        self._contributions = contributions
        self._control = {kind.type: ("workflows", kind) for kind in CONTROL_TYPES}

    def find(self, name: str) -> StepType | None:
        """Return a step type, or None if no active plugin provides it."""
        found = self.all().get(name)
        return found[1] if found is not None else None

    def all(self) -> Mapping[str, tuple[str, StepType]]:
        """Return all step types, keyed by name, each with the name of the plugin that contributes it."""
        found = dict(self._control)
        for plugin, kind in self._contributions.for_hook("corral_workflow_steps"):
            found.setdefault(kind.type, (plugin, kind))
        return found

    def gotos(self, type: str, config: Json) -> Mapping[str, str]:
        """Return the names of the steps that a step of this type can jump to, keyed by the JSON pointer to the name."""
        kind = self.find(type)
        return {} if kind is None or kind.gotos is None else kind.gotos(config)
