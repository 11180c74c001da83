"""Records the results of attempts, and then schedules retries, resumes deliveries or disables a failing webhook.

Every method runs in the caller's unit of work.
"""

from __future__ import annotations

import random
from typing import Any

from corral import clock
from corral.database.unit import locked
from corral.plugin import Settings
from corral_plugins.webhooks.models import Delivery, Webhook
from corral_plugins.webhooks.service.claims import ClaimedDelivery, has_valid_claim
from corral_plugins.webhooks.service.disabling import AT_ONCE, disable_webhook, ended_columns
from corral_plugins.webhooks.service.sender import AttemptResult
from corral_plugins.webhooks.settings import DISABLE_AFTER_SECONDS, PROBE_SECONDS, RETRY_SCHEDULE

JITTER = 0.1
GONE = 410
FEWEST_FAILURES = 10
KEPT_ATTEMPTS = 20
HOUR, DAY = 3600.0, 86_400.0
DAY_PROBE_SECONDS, LATER_PROBE_SECONDS = 300, 900


class DeliveryOutcomes:
    """Records the results of delivery attempts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def record(self, claimed: ClaimedDelivery, result: AttemptResult, at: str) -> bool:
        """Record the result of an attempt that began at `at`. Return False if the claim is no longer valid.

        Rows are locked in the same order as during a claim: first the webhook's row, then the rows of deliveries.
        """
        row: Webhook | None = locked(Webhook.select().where(Webhook.id == claimed.webhook.id)).first()
        if not self._end_attempt(claimed, result, at):
            return False
        if row is None:
            return True
        if result.is_success:
            self._on_success(row, result)
        else:
            self._on_failure(row, result)
        return True

    def _end_attempt(self, claimed: ClaimedDelivery, result: AttemptResult, at: str) -> bool:
        delivery = claimed.delivery
        made = {
            "n": delivery.tries + 1,
            "at": at,
            "status_code": result.status_code,
            "error": result.error,
            "duration_ms": result.duration_ms,
            "response": result.response,
        }
        changes: dict[str, Any] = {
            "tries": delivery.tries + 1,
            "attempts": [*delivery.attempts, made][-KEPT_ATTEMPTS:],
            "error": result.error,
            "status_code": result.status_code,
            **self._next_state(claimed, result),
        }
        return bool(Delivery.update(changes).where(has_valid_claim(delivery)).execute())

    def _next_state(self, claimed: ClaimedDelivery, result: AttemptResult) -> dict[str, Any]:
        """Return the changes to a delivery's state.

        A failed probe does not change the time of the next regular attempt.
        """
        delivery, schedule = claimed.delivery, self._settings.get(RETRY_SCHEDULE)
        attempt = delivery.attempt + (0 if claimed.is_probe and not result.is_success else 1)
        if result.is_success:
            return {**ended_columns("succeeded"), "attempt": attempt}
        if attempt >= len(schedule) or result.status_code == GONE:
            return {**ended_columns("failed"), "attempt": attempt}
        due = delivery.next_attempt_at if claimed.is_probe else _next_attempt(schedule[attempt], result.retry_after)
        waits = {"next_attempt_at": due, "due_at": due, "lease": None, "lease_until": None}
        return {"status": "retrying", "attempt": attempt, **waits}

    def _on_success(self, row: Webhook, result: AttemptResult) -> None:
        """Record that the webhook is no longer failing, and make its next waiting retries due immediately.

        One batch of retries is enough, because every success makes another batch due, long before the previous one has
        been sent.
        """
        recovered = {"failing_since": None, "failures": 0, "next_probe_at": None}
        told = {"last_success_at": clock.now(), "last_status_code": result.status_code}
        Webhook.update({**recovered, **told}).where(Webhook.id == row.id).execute()
        now = clock.now()
        waiting = Delivery.select(Delivery.id).where((Delivery.webhook_id == row.id) & (Delivery.due_at > now))
        some = waiting.order_by(Delivery.due_at).limit(AT_ONCE)
        due = {"due_at": now, "next_attempt_at": now}
        Delivery.update(due).where(Delivery.id.in_(some) & Delivery.due_at.is_null(False)).execute()

    def _on_failure(self, row: Webhook, result: AttemptResult) -> None:
        now = clock.now()
        since = row.failing_since or now
        elapsed = (clock.elapsed_ms(since, now)) / 1000
        changes = {
            "failing_since": since,
            "failures": Webhook.failures + 1,
            "next_probe_at": self._next_probe(elapsed),
            "last_status_code": result.status_code,
        }
        Webhook.update(changes).where(Webhook.id == row.id).execute()
        row.failing_since = since
        limit = self._settings.get(DISABLE_AFTER_SECONDS)
        if result.status_code == GONE:
            disable_webhook(row, "gone")
        elif limit and elapsed >= limit and row.failures + 1 >= FEWEST_FAILURES:
            disable_webhook(row, "failing")

    def _next_probe(self, failing_seconds: float) -> str | None:
        step = self._settings.get(PROBE_SECONDS)
        if not step:
            return None
        least = 0 if failing_seconds < HOUR else DAY_PROBE_SECONDS if failing_seconds < DAY else LATER_PROBE_SECONDS
        return clock.now(max(step, least))


def _next_attempt(seconds: float, retry_after: float | None) -> str:
    if retry_after is not None:
        return clock.now(retry_after)
    return clock.now(seconds * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311  (not for secrets)
