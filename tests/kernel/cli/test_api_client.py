"""The HTTP client of commands that call a running server."""

from __future__ import annotations

import operator
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.cli.api_client import ApiClient, ApiClientError, TextDeltaTracker, _plural, _problem_error
from corral.cli.object_lookup import newest_id
from corral.testing.server import free_port


def test_a_growing_text_is_told_once() -> None:
    live = TextDeltaTracker()
    assert live.add("Once upon") == (False, "Once upon")
    assert live.add("Once upon a time") == (True, " a time")
    assert live.add("Once upon a time") == (True, "")
    assert live.add("Step 1 of at most 25") == (False, "Step 1 of at most 25")
    assert live.add("Once more") == (False, "Once more")


class Listed:
    """A list of two notifications, the newest first."""

    url = "http://127.0.0.1:8000"

    def get(self, path: str, **query: Any) -> Any:
        newest = {"id": "2", "titles": ["Task failed: b", "Task failed: a"]}
        return {"items": [newest, {"id": "1", "titles": ["Task failed: a"]}]}


def test_an_object_of_several_titles_is_found_by_each() -> None:
    def found(wanted: str) -> str:
        client: Any = Listed()
        titles: Any = operator.itemgetter("titles")
        return newest_id(client, "/notifications", wanted, kind="notification", titles=titles, listing="corral list")

    assert [found("Task failed: b"), found("task failed: A ")] == ["2", "2"]
    with pytest.raises(ApiClientError, match="there is no notification Task failed: c"):
        found("Task failed: c")


def test_of_a_long_text_only_the_end_is_told() -> None:
    text = " ".join(str(number) for number in range(1000))
    live, heard = TextDeltaTracker(), ""
    for at in range(0, len(text) + 300, 300):
        goes_on, fresh = live.add(text[:at][-500:])
        assert goes_on or at < 600
        heard += fresh
    assert heard == text


def test_the_ellipsis_of_a_cut_text_is_told_only_where_the_text_begins() -> None:
    live = TextDeltaTracker()
    assert live.add("… the crew of the ship went") == (False, "… the crew of the ship went")
    assert live.add("… crew of the ship went home") == (True, " home")
    assert live.add("… of the ship went home early") == (True, " early")


@given(st.lists(st.text(min_size=1, max_size=60), max_size=20))
def test_whatever_is_told_by_growing_is_complete(parts: list[str]) -> None:
    live, told, heard = TextDeltaTracker(), "", ""
    for part in parts:
        told += part
        heard += live.add(told)[1]
    assert heard == told


def test_a_server_that_is_not_there_is_named() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ApiClientError, match=re.escape(address)) as caught:
        ApiClient(address).get("/health/ready")
    assert caught.value.status is None


def test_the_plural_of_a_kind() -> None:
    assert [_plural(kind) for kind in ("agent", "repository", "SSH connection")] == [
        "agents",
        "repositories",
        "SSH connections",
    ]


PROBLEM = {"title": "The request is not valid", "status": 422, "code": "validation_error", "request_id": "1"}


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            {
                "detail": "2 fields are not valid",
                "errors": [
                    {"pointer": "/steps/0/config", "code": "required", "detail": "the field url is required"},
                    {"pointer": "/steps/0/config", "code": "unknown_field", "detail": "uri is not a known field"},
                ],
            },
            "2 fields are not valid\n"
            "  /steps/0/config: the field url is required\n"
            "  /steps/0/config: uri is not a known field",
        ),
        (
            {
                "detail": "There is no agent with this id.",
                "errors": [{"pointer": "/steps/1/agent_id", "code": "x", "detail": "There is no agent with this id."}],
            },
            "/steps/1/agent_id: There is no agent with this id",
        ),
        (
            {
                "detail": "Too old.",
                "errors": [
                    {"pointer": "/a", "code": "x", "detail": "Too old."},
                    {"pointer": "", "code": "x", "detail": "Give one of a and b."},
                ],
            },
            "The request is not valid\n  /a: Too old\n  Give one of a and b",
        ),
        ({"detail": "Not found.", "title": "Not found", "code": "not_found"}, "Not found: /workflow-runs/7"),
    ],
    ids=["several", "one", "repeated", "not-found"],
)
def test_each_fault_is_told_with_its_place(problem: dict[str, Any], message: str) -> None:
    error = _problem_error("/workflow-runs/7", 422, msgspec.json.encode({**PROBLEM, **problem}))
    assert str(error) == message
