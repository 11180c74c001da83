"""Shapes and values that the tests of `corral.schema` share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from corral.errors import Invalid
from corral.schema.conversion import convert
from corral.schema.fields import MomentIn, Tags, Title

ID = "01890a5d-ac96-774b-bcce-b302099a8057"

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(st.characters()), inner, max_size=5),
)


class Priority(Enum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class Circle(msgspec.Struct, tag="circle", kw_only=True, forbid_unknown_fields=True):
    radius: Annotated[int, Meta(ge=1)]


class Square(msgspec.Struct, tag="square", kw_only=True, forbid_unknown_fields=True):
    side: int


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    title: Title
    priority: Priority = Priority.MEDIUM
    level: Literal["low", "high", "critical"] | None = None
    count: Annotated[int, Meta(ge=1, le=200)] = 50
    due: MomentIn | UnsetType | None = UNSET
    tags: Tags = []
    shape: Circle | Square | None = None
    numbers: dict[str, int] = {}
    parts: list[Order] = []


class Query(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    ratio: float | None = None
    urgent: bool | None = None
    status: list[Literal["open", "done"]] = []
    since: MomentIn | None = None
    q: Title | None = None


def faults(kind: Any, value: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        convert(kind, value, **options)
    assert caught.value.status == 422
    return [(each.pointer, each.code) for each in caught.value.errors]
