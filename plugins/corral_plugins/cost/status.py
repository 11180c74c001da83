"""The line of `corral status` about budgets."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.output import format_usd
from corral.cli.status_parts import StatusPart, read_if_allowed


def budget_status(client: ApiClient) -> StatusPart:
    """Describe the budgets that have reached an alert threshold."""
    budget = read_if_allowed(client, "/cost/budget")
    if budget is None:
        return StatusPart(None)
    lines = []
    if budget["status"] != "ok":
        used = f"{format_usd(budget['spent_usd'])} of {format_usd(budget['monthly_limit'])} spent this month"
        state = "used up" if budget["status"] == "exceeded" else f"{budget['percent']:g} % used"
        effect = "; paid calls wait" if budget["status"] == "exceeded" and budget["mode"] == "hard" else ""
        lines.append(f"{state}: {used}{effect}. Raise it: corral cost budget set --limit USD")
    if exceeded := [each for each in budget["by_agent"] if each["spent"] >= each["limit"]]:
        agents = "1 agent has" if len(exceeded) == 1 else f"{len(exceeded)} agents have"
        lines.append(f"{agents} used up the own budget: corral cost budget show")
    return StatusPart(budget, "\n".join(lines) or None)
