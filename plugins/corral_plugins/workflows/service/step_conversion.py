"""Converts the steps in a request to the form that is stored in definitions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral.errors import FieldError, Invalid
from corral.ids import new_id
from corral.schema.conversion import convert
from corral_plugins.workflows.shapes import NewStep, StepFields, StepPatch, StepView, WorkflowConfig

Json = dict[str, Any]
DEFAULTS: Json = {
    "config": {},
    "agent_id": None,
    "depends_on": None,
    "run_if": "success",
    "when": None,
    "retry_policy": None,
    "timeout_seconds": None,
    "on_error": "fail",
}
MAX_DEPTH = 6


def slug_of(name: str) -> str:
    """Convert the name of a step to a form that can be used in expressions."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")
    slug = slug if slug[:1].isalpha() else f"step_{slug}"
    return slug[:63].rstrip("_")


def stored_steps(given: Sequence[NewStep]) -> list[Json]:
    """Return all steps of a workflow in their stored form, sorted by order."""
    found: list[Json] = []
    for new in given:
        found.append(stored_step(new, found))
    return sorted(resolve_references(found), key=lambda step: step["order"])


def stored_step(new: NewStep, others: Sequence[Json], depth: int = 0) -> Json:
    """Return a step in its stored form. A step without `order` is placed after all steps in `others`."""
    step: Json = {"id": new_id(), **_name_and_title(new.name, new.title), "step_type": new.step_type}
    step["order"] = max((each["order"] for each in others), default=0) + 1
    return {**step, **DEFAULTS, **given_fields(new, depth)}


def given_fields(given: StepFields, depth: int = 0) -> Json:
    """Return the fields that a request sets, except the name, the title and the type of the step."""
    fields = {name: getattr(given, name) for name in ("order", *DEFAULTS) if getattr(given, name) is not UNSET}
    if fields.get("retry_policy") is not None:
        fields["retry_policy"] = msgspec.to_builtins(fields["retry_policy"])
    if "agent_id" in fields and fields["agent_id"] is not None:
        fields["agent_id"] = fields["agent_id"].lower()
    if "config" in fields:
        fields["config"] = _with_inner_steps(fields["config"], depth)
    return fields


def patched_step(step: Json, patch: StepPatch) -> Json:
    """Return a step with the changes from a request applied."""
    names = {} if patch.name is UNSET else _name_and_title(patch.name, patch.title)
    if patch.name is UNSET and patch.title is not UNSET:
        names = {"title": patch.title}
    kind = {} if patch.step_type is UNSET else {"step_type": patch.step_type}
    return {**step, **names, **kind, **given_fields(patch)}


def resolve_references(steps: Sequence[Json]) -> list[Json]:
    """Return the steps with their `depends_on` converted to names. Requests may also use ids and titles."""
    known = {step["id"]: step["name"] for step in steps}
    found = []
    for step in steps:
        needed = step["depends_on"]
        if needed is not None:
            names = {each["name"] for each in steps}
            needed = [known.get(ref.lower()) or (ref if ref in names else slug_of(ref)) for ref in needed]
        found.append({**step, "depends_on": needed})
    return found


def stored_config(config: WorkflowConfig) -> Json:
    """Return the configuration of a workflow in its stored form."""
    found: Json = msgspec.to_builtins(config)
    return {name: value for name, value in found.items() if value is not None}


def step_view(step: Json) -> StepView:
    """Return the API representation of a stored step."""
    return msgspec.convert(step, StepView)


def _name_and_title(name: str, title: Any) -> Json:
    return {"name": slug_of(name), "title": name.strip() if title is UNSET else title}


def _with_inner_steps(config: Json, depth: int) -> Json:
    """Return a configuration with its inner steps in their stored form.

    If the inner steps are malformed, the configuration is returned unchanged, because the schema of the step type
    reports the error.
    """
    if depth >= MAX_DEPTH:
        return config
    if isinstance(config.get("body"), list):
        return {**config, "body": _stored_inner_steps(config["body"], "/config/body", depth)}
    if isinstance(config.get("branches"), list):
        branches = [
            {**branch, "steps": _stored_inner_steps(branch["steps"], f"/config/branches/{n}/steps", depth)}
            if isinstance(branch, dict) and isinstance(branch.get("steps"), list)
            else branch
            for n, branch in enumerate(config["branches"])
        ]
        return {**config, "branches": branches}
    return config


def _stored_inner_steps(given: list[Any], pointer: str, depth: int) -> list[Any]:
    found: list[Json] = []
    for n, each in enumerate(given):
        try:
            new = convert(NewStep, _without_stored_names(each))
        except Invalid as invalid:
            detail = "; ".join(f"{fault.pointer.removeprefix('/')}: {fault.detail}" for fault in invalid.errors)
            raise Invalid(
                "A nested step is not valid.",
                errors=[FieldError(f"{pointer}/{n}", "wrong_type", detail.removeprefix(": "))],
            ) from None
        found.append(stored_step(new, found, depth + 1))
    return resolve_references(found)


def _without_stored_names(step: Any) -> Any:
    """Return an inner step without its id, so that clients can send back a step as they received it."""
    return {key: value for key, value in step.items() if key != "id"} if isinstance(step, dict) else step
