"""Describes why the steps of a run are waiting, for the output of `corral workflows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames
from corral.cli.status_parts import read_if_allowed

ENDED = ("completed", "failed", "skipped", "cancelled")
WAITS_FOR = {
    "task": ("/tasks", "title"),
    "approval": ("/approvals", "title"),
    "child_run": ("/workflow-runs", "number"),
}
"""The kinds of objects that a step may wait for, each with its API path and the field that contains its name."""
MAX_TASKS = 10  # tasks of one run that are asked why they wait


def step_name(step: Mapping[str, Any]) -> str:
    """Return the name of a step with the indexes of the enclosing loops, as in `name[0]`."""
    return str(step["name"]) + "".join(f"[{n}]" for n in step["iteration"])


def waited_for(names: ObjectNames, step: Mapping[str, Any]) -> str | None:
    """Return a description of the object that a step waits for, such as `task Sort the mail (…)`.

    Return None if the step does not wait for an object.
    """
    for kind, (path, field) in WAITS_FOR.items():
        identifier = step[f"{kind}_id"]
        if identifier is not None and step["status"] not in ENDED:
            name = names.name(path, identifier, field)
            return f"{kind.replace('_', ' ')} {name}{'' if name == identifier else f' ({identifier})'}"
    return None


def task_obstacles(client: ApiClient, run: Mapping[str, Any]) -> dict[str, str]:
    """Return why the tasks of steps are not running, keyed by the name of the step.

    The reason is the first unmet condition that `corral tasks explain` reports, with the command that resolves it.
    """
    waiting = [step for step in run["steps"] if step["task_id"] is not None and step["status"] not in ENDED]
    found = {}
    for step in waiting[:MAX_TASKS]:
        explained = read_if_allowed(client, f"/tasks/{step['task_id']}/explain")
        unmet = next((each for each in explained["conditions"] if not each["ok"]), None) if explained else None
        if unmet is not None:
            found[step_name(step)] = " ".join(filter(None, (unmet["detail"], unmet["unblock"])))
    return found
