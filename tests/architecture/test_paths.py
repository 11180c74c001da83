"""The table from which a built-in plugin that did not come up answers 503 is that of the routes there are."""

from __future__ import annotations

import json
from importlib import resources

from corral.testing import generator_command, path_table


def test_the_table_of_paths_is_up_to_date() -> None:
    """After a change of routes: `python -m corral.testing.path_table --write`."""
    assert generator_command.outdated(path_table.generated_files()) == []


def test_the_table_names_the_built_in_plugins_that_can_be_missing() -> None:
    table = json.loads(resources.files("corral_plugins").joinpath("paths.json").read_bytes())
    assert list(table) == sorted(table)
    assert {"accounts", "admin", "agents", "health", "tasks", "workers"} <= table.keys()
