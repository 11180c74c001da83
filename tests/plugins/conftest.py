"""The tests of plugins use each kernel one after the other, because booting one takes longer than most tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def reuse_kernels() -> bool:
    """Use a kernel again that another test has used, with its memory and its database put back."""
    return True
