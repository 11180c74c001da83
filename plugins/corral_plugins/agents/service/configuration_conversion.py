"""Converts between the fields that people set, the columns of the agents table, and the configuration of a version."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral.errors import Forbidden, Invalid
from corral.plugin import Setting
from corral.schema.json_schema_validation import check_user_schema
from corral_plugins.agents.models import Agent
from corral_plugins.agents.shapes import AgentConfig, AgentFields
from corral_plugins.tasks.api import ReviewPolicy, refuse_unenforced

MAX_STEPS: Setting[int] = Setting(
    name="agents.max_steps",
    kind=int,
    default=25,
    minimum=1,
    maximum=200,
    title="Default maximum number of steps of a run",
)

METADATA_BYTES = 16 * 1024
PLAIN = (
    "description",
    "role",
    "llm_provider",
    "llm_model",
    "system_prompt",
    "enabled_tools",
    "worker_id",
    "max_concurrent_tasks",
    "tags",
    "metadata",
)
STRUCTURED = ("tool_policy", "retry_policy", "stall_policy", "review_policy")
NO_REVIEW = msgspec.to_builtins(ReviewPolicy())
"""The review policy of agents for which none was set."""
MONEY = {"monthly_budget_usd": "monthly_budget_micro", "max_cost_per_task_usd": "max_cost_per_task_micro"}
"""Maps the fields that contain amounts in USD to the columns that store these amounts in micro-USD."""
FIELD_OF = {
    "worker_group": "worker_selector",
    "worker_labels": "worker_selector",
    **{column: field for field, column in MONEY.items()},
}
CONFIGURATION = frozenset(
    {
        "llm_provider",
        "llm_model",
        "system_prompt",
        "enabled_tools",
        "tool_policy",
        "worker_id",
        "worker_selector",
        "config",
        "max_concurrent_tasks",
        "retry_policy",
        "stall_policy",
        "review_policy",
        *MONEY,
    }
)
"""The names of the configuration fields. Changing one of these fields creates a new version."""
COPIED = (*PLAIN, *STRUCTURED, *MONEY.values(), "worker_group", "worker_labels", "config")
"""The columns that are copied when an agent is cloned: all columns that people set, except the name."""


def default_config(max_steps: int) -> dict[str, Any]:
    """Return the default configuration of an agent."""
    return {
        "temperature": None,
        "max_tokens": None,
        "max_steps": max_steps,
        "fallback_models": [],
        "output_schema": None,
        "memory": True,
        "knowledge": True,
    }


def to_columns(
    fields: AgentFields, config: dict[str, Any], *, enforces_budgets: bool, performs_reviews: bool
) -> dict[str, Any]:
    """Return the column values for the fields that are set.

    If `fields.config` is set, its absent parts are taken from `config`. Raise `Invalid` if a value breaks a rule that
    the type annotations cannot express, for example the maximum size of the metadata.
    """
    given = {name: getattr(fields, name) for name in fields.__struct_fields__}
    refuse_unenforced(given, enforces_budgets=enforces_budgets, performs_reviews=performs_reviews)
    found: dict[str, Any] = {name: value for name in PLAIN if (value := getattr(fields, name)) is not UNSET}
    for name in STRUCTURED:
        if (value := getattr(fields, name)) is not UNSET:
            found[name] = msgspec.to_builtins(value)
    for name, column in MONEY.items():
        if (usd := given[name]) is not UNSET:
            found[column] = None if usd is None else round(usd * 1_000_000)
    if fields.worker_selector is not UNSET:
        found["worker_group"] = fields.worker_selector.group
        found["worker_labels"] = fields.worker_selector.labels
    if isinstance(fields.config, AgentConfig):
        found["config"] = _merge_config(config, fields.config)
    if isinstance(reviewer := (found.get("review_policy") or {}).get("reviewer_agent_id"), str):
        found["review_policy"]["reviewer_agent_id"] = reviewer.lower()
    if isinstance(found.get("worker_id"), str):
        found["worker_id"] = found["worker_id"].lower()
    if len(msgspec.json.encode(found.get("metadata", {}))) > METADATA_BYTES:
        raise Invalid.at("/metadata", "too_long", f"at most {METADATA_BYTES} bytes of JSON")
    return found


def _merge_config(config: dict[str, Any], change: AgentConfig) -> dict[str, Any]:
    if isinstance(change.output_schema, dict):
        check_user_schema(change.output_schema, pointer_prefix="/config/output_schema")
    return {**config, **msgspec.to_builtins(change)}


def refuse_loosened_tool_policy(before: dict[str, Any], after: dict[str, Any], *, manages: bool) -> None:
    """Raise `Forbidden` if, in tainted runs, the tool policy `after` allows tools that `before` does not allow.

    A run is tainted after it has received content that strangers may have written. `manages` says whether the caller is
    an admin. If it is true, this function does nothing.
    """
    loosened = sorted(_allowed_when_tainted(after) - _allowed_when_tainted(before))
    if loosened and not manages:
        raise Forbidden(
            f"Setting when_tainted to `allow` for {', '.join(loosened[:5])} requires the permission agents.manage."
        )


def _allowed_when_tainted(policy: dict[str, Any]) -> set[str]:
    return {tool for tool, rule in policy.items() if isinstance(rule, dict) and rule.get("when_tainted") == "allow"}


def worker_selector_view(row: Agent) -> dict[str, Any]:
    """Return an agent's worker selector in the form that the API returns. Fields that are not set are omitted."""
    found: dict[str, Any] = {}
    if row.worker_group is not None:
        found["group"] = row.worker_group
    if row.worker_labels:
        found["labels"] = row.worker_labels
    return found


def usd_of(micro_usd: int | None) -> float | None:
    """Convert a limit from micro-USD to USD. None means that there is no limit."""
    return None if micro_usd is None else micro_usd / 1_000_000


def version_configuration(row: Agent) -> dict[str, Any]:
    """Return the agent's configuration in the form in which it is stored as a version.

    The result can be converted back to `AgentFields`.
    """
    special: dict[str, Any] = {"worker_selector": worker_selector_view(row)}
    special |= {"review_policy": row.review_policy or NO_REVIEW}
    special |= {name: usd_of(getattr(row, column)) for name, column in MONEY.items()}
    return {name: special[name] if name in special else getattr(row, name) for name in sorted(CONFIGURATION)}
