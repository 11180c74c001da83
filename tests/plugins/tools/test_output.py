"""Truncation of results."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral_plugins.tools.service.call_store import LIMIT, truncate_output

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=20), inner, max_size=8),
    max_leaves=40,
)


@given(VALUES, st.integers(400, 3000))
def test_it_fits_whatever_it_is(value: Any, limit: int) -> None:
    kept = truncate_output(value, limit)
    size = len(msgspec.json.encode(value))
    assert len(msgspec.json.encode(kept)) <= limit
    assert (kept == value) == (size <= limit)


@pytest.mark.parametrize("value", ["x" * 200_000, '"\\\n' * 50_000, "ä€" * 60_000, {"text": "x" * 200_000, "n": 1}])
def test_long_texts_are_cut_with_a_note(value: Any) -> None:
    kept = truncate_output(value)
    assert len(msgspec.json.encode(kept)) <= LIMIT
    text = kept["text"] if isinstance(kept, dict) else kept
    assert text.endswith("are omitted]")
    assert len(text.encode()) > LIMIT / 4
    if isinstance(kept, dict):
        assert kept["n"] == 1


def test_what_has_no_long_text_becomes_one() -> None:
    kept = truncate_output(list(range(100_000)))
    assert kept["cut"].startswith("[0,1,2,")
