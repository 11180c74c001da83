"""The line about budgets in the output of `corral status`."""

from __future__ import annotations

import shlex

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_usd
from corral.cli.status_parts import MAX_NAMES, StatusPart, read_if_allowed


def budget_status(client: ApiClient) -> StatusPart:
    """Describe the budgets that have reached an alert threshold."""
    budget = read_if_allowed(client, "/cost/budget", needs="cost.read")
    if budget is None:
        return StatusPart(None)
    lines = []
    if budget["status"] != "ok":
        used = f"{format_usd(budget['spent_usd'])} of {format_usd(budget['monthly_limit'])} spent this month"
        state = "used up" if budget["status"] == "exceeded" else f"{budget['percent']:g} % used"
        effect = "; paid calls wait" if budget["status"] == "exceeded" and budget["mode"] == "hard" else ""
        lines.append(f"{state}: {used}{effect}. Raise it: corral cost budget set --limit USD")
    exceeded = [each for each in budget["by_agent"] if each["spent"] >= each["limit"]]
    names = ObjectNames(client)
    for each in exceeded[:MAX_NAMES]:
        name = names.name("/agents", each["agent_id"])
        used = f"{format_usd(each['spent'])} of {format_usd(each['limit'])}"
        how = f"corral agents edit {shlex.quote(name)} -f monthly_budget_usd:=USD"
        lines.append(f"the agent {name} has used up its own budget, {used}. Raise it: {how}")
    if len(exceeded) > MAX_NAMES:
        lines.append(f"{len(exceeded) - MAX_NAMES} more agents: corral cost budget show")
    return StatusPart(budget, "\n".join(lines) or None)
