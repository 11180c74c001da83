"""`corral.schema.fields`: what each type of field takes."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
from tests.kernel.schema.cases import ID, faults

from corral.schema.conversion import convert
from corral.schema.fields import Id, MomentIn, Name, ShortText, Slug, Tags, Text, Title, line
from corral.schema.json_schema_validation import json_schema_errors


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Name, ["a", "\u00e9" * 100, " x "], ["", "a" * 101, "a\n", "\n", "a\tb", "\x7f", "\x85", "\u2028", "a\u2029"]),
        (Title, ["a" * 200], ["", "a" * 201, "a\r\nb"]),
        (ShortText, ["", "a" * 500], ["a" * 501, "a\n"]),
        (Text, ["", "a\n\tb\x1b", "\u00e9" * 65536], ["a" * 65537]),
        (Slug, ["a", "0-_z", "a" * 64], ["", "A", "-a", "a\n", "a" * 65, "\u00e9"]),
        (Id, [ID, ID.upper()], ["", ID + "\n", ID[:-1], ID.replace("-", ""), "{" + ID + "}", "g" + ID[1:]]),
        (Tags, [[], ["a"] * 20, ["a" * 64]], [["a"] * 21, [""], ["a" * 65], ["a\n"]]),
        (Annotated[str, line(3)], ["abc"], ["abcd", "", "ab\n"]),
        (MomentIn, ["2026-01-01T00:00:00Z"], ["2026-01-01T00:00:00", "2026-01-01", "x", 5]),
    ],
)
def test_field_types(kind: Any, good: list[Any], bad: list[Any]) -> None:
    document = msgspec.json.schema(kind)
    for value in good:
        convert(kind, value)
        assert json_schema_errors(document, value) == []
    for value in bad:
        assert len(faults(kind, value)) == 1
        assert json_schema_errors(document, value)
