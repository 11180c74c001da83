"""The tests of some plugins use each kernel one after the other, because booting one takes longer than most tests."""

from __future__ import annotations

import pytest

REUSED = ("agents", "approvals", "code_reviews", "tasks", "tools")


@pytest.fixture
def reuse_kernels(request: pytest.FixtureRequest) -> bool:
    """Use a kernel again that another test has used, with its memory and its database put back."""
    return request.path.parent.name in REUSED
