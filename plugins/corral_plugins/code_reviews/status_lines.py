"""The lines about code reviews in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed, some_names


def review_status(client: ApiClient) -> StatusPart:
    """Describe the code reviews that wait for a decision."""
    found = read_if_allowed(client, "/code-reviews", needs="code_reviews.read", status="pending")
    if found is None or not found["items"]:
        return StatusPart(found)
    verb = "waits" if found["total"] == 1 else "wait"
    told = f"{found['total']} {verb} for a decision: {some_names(each['title'] for each in found['items'])}"
    return StatusPart(found, f"{told}\nRead one: corral reviews diff TITLE, then approve, request-changes or reject")
