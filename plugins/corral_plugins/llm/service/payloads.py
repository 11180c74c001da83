"""What was asked and answered, kept redacted where the settings say so, for whoever may see the call."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.plugin import Settings
from corral_plugins.llm.models import LlmCall, LlmPayload
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.settings import PAYLOAD_DAYS, STORE_PAYLOADS

DAY_SECONDS = 86_400
PRUNE_AT_ONCE = 500


class Payloads:
    """Joins the caller's unit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def wants_answers(self) -> bool:
        """Whether answers of calls that succeed are kept, so that streams must be put together."""
        return self._settings.get(STORE_PAYLOADS) == "all"

    def keep(self, call_id: str, request: dict[str, Any], outcome: Outcome) -> None:
        """Keep a call's, if it is one of those that are kept."""
        which = self._settings.get(STORE_PAYLOADS)
        if which == "all" or (which == "errors" and outcome.status == "failed"):
            LlmPayload.insert(
                call_id=call_id, created_at=clock.now(), request=request, response=outcome.response
            ).on_conflict_ignore().execute()

    def forget(self, user_id: str) -> bool:
        """Delete what was kept of a purged person's calls, at most 500; True: there is more."""
        of_person = LlmPayload.select(LlmPayload.call_id).join(LlmCall, on=(LlmCall.id == LlmPayload.call_id))
        found = of_person.where(LlmCall.user_id == user_id).limit(PRUNE_AT_ONCE)
        return bool(LlmPayload.delete().where(LlmPayload.call_id.in_(found)).execute() == PRUNE_AT_ONCE)

    def prune(self) -> int:
        """Delete what is older than `llm.payload_days`; at most 500 rows."""
        before = clock.now(-self._settings.get(PAYLOAD_DAYS) * DAY_SECONDS)
        old = LlmPayload.select(LlmPayload.call_id).where(LlmPayload.created_at < before).limit(PRUNE_AT_ONCE)
        return int(LlmPayload.delete().where(LlmPayload.call_id.in_(old)).execute())


def payload_of(call_id: str) -> dict[str, Any] | None:
    """`{request, response}` of a call; None: it was not kept, or is over."""
    row = LlmPayload.get_or_none(LlmPayload.call_id == call_id)
    return None if row is None else {"request": row.request, "response": row.response}
