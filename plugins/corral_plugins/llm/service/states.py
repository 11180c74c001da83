"""What is seen of providers: when one answered last, what went wrong last, and alarms about refused keys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from corral import clock
from corral.database.unit import after_commit
from corral.events.event import SystemAlert, emit
from corral_plugins.llm.models import LlmProviderState
from corral_plugins.llm.service.outcome import Outcome

WRITE_EVERY = 30.0
ALERT_EVERY = 3600.0


class States:
    """Joins the caller's unit. A provider that goes on as before is written every 30 s, so that calls do not queue."""

    def __init__(self) -> None:
        self._noted: dict[tuple[str, str], float] = {}

    def note(self, outcome: Outcome) -> None:
        """Keep how a call to the provider went."""
        name = outcome.target.provider.name
        if outcome.status == "failed" and outcome.attempts:
            self.note_failure(name, outcome.error or {}, credentials_refused=outcome.credentials_refused)
        elif outcome.status == "completed" and self._is_news(name, "completed"):
            change(name, last_ok_at=clock.now(), last_error=None)

    def note_failure(self, name: str, error: Mapping[str, Any], *, credentials_refused: bool) -> None:
        """Keep that a call to a provider failed, whoever serves it then."""
        if self._is_news(name, "failed"):
            change(name, last_error={**error, "at": clock.now()})
        if credentials_refused:
            self._alert(name, error)

    def _is_news(self, name: str, status: str) -> bool:
        key = (name, status)
        if time.monotonic() - self._noted.get(key, -WRITE_EVERY) < WRITE_EVERY:
            return False
        after_commit(lambda: self._remember(key))
        return True

    def _remember(self, key: tuple[str, str]) -> None:
        """The other state is news again."""
        self._noted[key] = time.monotonic()
        self._noted.pop((key[0], "failed" if key[1] == "completed" else "completed"), None)

    @staticmethod
    def _alert(name: str, error: Mapping[str, Any]) -> None:
        """At most once an hour a provider, over all processes."""
        state = LlmProviderState
        due = state.alerted_at.is_null() | (state.alerted_at < clock.now(-ALERT_EVERY))
        change(name)
        if state.update(alerted_at=clock.now()).where((state.name == name) & due).execute():
            alert = SystemAlert(
                kind="llm_credentials",
                severity="critical",
                title=f"The provider {name} refuses its key",
                detail=str(error.get("detail", "")),
                object={"type": "llm_provider", "id": name},
            )
            emit(alert, object=("llm_provider", name))


def change(name: str, **values: Any) -> None:
    """Write into the provider's state, which is made if need be."""
    if not values:
        LlmProviderState.insert(name=name).on_conflict_ignore().execute()
        return
    insert = LlmProviderState.insert(name=name, **values)
    insert.on_conflict(conflict_target=[LlmProviderState.name], update=values).execute()
