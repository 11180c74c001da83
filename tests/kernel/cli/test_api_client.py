"""The HTTP client of commands that call a running server."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.cli.api_client import ApiClient, ApiClientError, TextDeltaTracker


def test_a_growing_text_is_told_once() -> None:
    live = TextDeltaTracker()
    assert live.add("Once upon") == (False, "Once upon")
    assert live.add("Once upon a time") == (True, " a time")
    assert live.add("Once upon a time") == (True, "")
    assert live.add("Step 1 of at most 25") == (False, "Step 1 of at most 25")
    assert live.add("Once more") == (False, "Once more")


def test_of_a_long_text_only_the_end_is_told() -> None:
    text = " ".join(str(number) for number in range(1000))
    live, heard = TextDeltaTracker(), ""
    for at in range(0, len(text) + 300, 300):
        goes_on, fresh = live.add(text[:at][-500:])
        assert goes_on or at < 600
        heard += fresh
    assert heard == text


@given(st.lists(st.text(min_size=1, max_size=60), max_size=20))
def test_whatever_is_told_by_growing_is_complete(parts: list[str]) -> None:
    live, told, heard = TextDeltaTracker(), "", ""
    for part in parts:
        told += part
        heard += live.add(told)[1]
    assert heard == told


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ApiClientError, match=re.escape(address)) as caught:
        ApiClient(address).get("/health/ready")
    assert caught.value.status is None
