"""The lines of `corral status` about webhooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import MAX_NAMES, StatusPart, read_if_allowed

FAILED = ("failing", "gone")  # the reasons for which Corral disables a webhook whose owner did nothing


def webhook_status(client: ApiClient) -> StatusPart:
    """Describe the user's webhooks that are failing, or that Corral disabled because they failed."""
    found = read_if_allowed(client, "/webhooks", needs="webhooks.read", limit=200)
    if found is None:
        return StatusPart(None)
    bad = [each for each in found["items"] if _is_failing(each)]
    hosts = Counter(each["host"] for each in found["items"])
    lines = [_describe(each, is_named=hosts[each["host"]] == 1) for each in bad[:MAX_NAMES]]
    if len(bad) > MAX_NAMES:
        lines.append(f"{len(bad) - MAX_NAMES} more: corral webhooks list")
    return StatusPart(bad, "\n".join(lines) or None)


def _is_failing(webhook: Any) -> bool:
    if not webhook["is_active"]:
        return webhook["disabled_reason"] in FAILED
    return webhook["failing_since"] is not None


def _describe(webhook: Any, *, is_named: bool) -> str:
    """Describe a webhook. `is_named` says whether the host is enough to identify the webhook."""
    host = webhook["host"]
    name = host if is_named else webhook["id"]
    if webhook["is_active"]:
        return f"{host} has failed since {webhook['failing_since']}. See why: corral webhooks deliveries {name}"
    return f"{host} was disabled ({webhook['disabled_reason']}). Enable it: corral webhooks enable {name}"
