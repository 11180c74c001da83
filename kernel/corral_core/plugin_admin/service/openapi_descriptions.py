"""Descriptions of fields for the OpenAPI document.

The description of a field comes from the first of these sources that describes the field:

- `Meta(description=…)`;
- the sentence in the docstring of the field's class that names the field in backticks; subclasses inherit it;
- a glossary, which describes fields by name: first the file `field_descriptions.json` of the class's plugin, then the
  file of this name in the `plugin_admin` plugin. The key of an entry is `field`, or `Class.field` for one class only.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, get_args, get_origin

import msgspec

GLOSSARY = "field_descriptions.json"
_SENTENCE_ENDS = re.compile(r"(?<=[.])\s+(?=[A-Z`])")


class FieldDescriptions:
    """The descriptions of the fields of all types that are reachable from `kinds`."""

    def __init__(self, kinds: Iterable[Any]) -> None:
        self._shapes: dict[str, type] = {}
        for shape in _reachable_shapes(kinds, set()):
            self._shapes[shape.__name__] = self._shapes[f"{shape.__module__}.{shape.__qualname__}"] = shape

    def add_to(self, name: str, schema: dict[str, Any]) -> None:
        """Add the missing descriptions to the properties of the component `name`."""
        shape = self._shapes.get(name)
        for field, each in schema.get("properties", {}).items():
            if "description" not in each and (text := describe_field(shape, field)) is not None:
                each["description"] = text


@cache
def describe_field(shape: type | None, field: str) -> str | None:
    """Return the description of a field of the type `shape`, or None if no source describes it."""
    for kind in shape.__mro__ if shape is not None else ():
        if (text := _sentence_about(kind, field)) is not None:
            return text
        glossary = _glossary_of(kind.__module__)
        if (text := glossary.get(f"{kind.__name__}.{field}")) is not None:
            return text
    return describe_name(field, __name__ if shape is None else shape.__module__)


def describe_name(name: str, module: str) -> str | None:
    """Return the description of the fields and path parameters with this name, or None if no glossary describes them.

    The glossary of the module's plugin takes precedence over the general glossary.
    """
    return _glossary_of(module).get(name) or _glossary_of(__name__).get(name)


def _sentence_about(shape: type, field: str) -> str | None:
    """Return a sentence about the field from the type's docstring, preferably one that begins with the field's name.

    The first sentence of a docstring describes the type itself, so it is used only if it begins with the field's name.
    """
    name, (first, *others) = f"`{field}`", _sentences_of(shape)
    about = [sentence for sentence in others if name in sentence] + ([first] if first.startswith(name) else [])
    return min(about, key=lambda sentence: sentence.find(name), default=None)


@cache
def _sentences_of(shape: type) -> list[str]:
    """Return the sentences of the type's docstring."""
    return _SENTENCE_ENDS.split(" ".join((inspect.cleandoc(shape.__doc__) if shape.__doc__ else "").split()))


@cache
def _glossary_of(module: str) -> Mapping[str, str]:
    """Return the glossary of the plugin package that contains the module."""
    package = ".".join(module.split(".")[:2])
    try:
        file = files(package).joinpath(GLOSSARY)
    except (ImportError, TypeError):  # a module outside any package, such as a test
        return {}
    found: dict[str, str] = json.loads(file.read_bytes()) if file.is_file() else {}
    return found


@lru_cache(maxsize=4096)  # evaluating the annotations of all shapes takes a sixth of the time of a document
def field_types(shape: type[msgspec.Struct]) -> list[Any]:
    """Return the types of the fields of a struct. The result is shared, so callers must not change it."""
    return [each.type for each in msgspec.structs.fields(shape)]


def _reachable_shapes(kinds: Iterable[Any], seen: set[Any]) -> Iterator[type]:
    for kind in kinds:
        if args := get_args(kind):
            yield from _reachable_shapes((get_origin(kind), *args), seen)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in seen:
            seen.add(kind)
            yield kind
            yield from _reachable_shapes(field_types(kind), seen)
