"""A damaged SQLite file is called damaged by every command that opens it, with the remedy."""

from __future__ import annotations

import os
from typing import Any

import pytest
from tests.kernel.cli.test_doctor import told as findings

pytestmark = [pytest.mark.sqlite, pytest.mark.one_engine]
COMMANDS = (("serve", "--bind", "127.0.0.1:0"), ("jobs",), ("user", "list"))


@pytest.mark.parametrize(("begin", "length"), [(0, 100), (100, 4000), (4096, 100_000)])
def test_reliability_a_damaged_file_is_named_as_damaged(
    served: Any,
    begin: int,
    length: int,
) -> None:
    path = served.home / "data" / "corral.db"
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(os.urandom(length))
    for command in COMMANDS:
        told = served(*command)
        assert told.status == 3, told
        assert f"{path} is damaged" in told.err
        assert "corral restore FILE" in told.err
        assert "cannot be reached" not in told.err
    status, detail, remedy = findings(served, "database")[-1]  # the file may answer before a damaged page is read
    assert (status, "is damaged" in detail, "corral restore FILE" in remedy) == ("down", True, True)
