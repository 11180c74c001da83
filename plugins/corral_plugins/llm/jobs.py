"""Background jobs and schedules of the LLM gateway."""

from __future__ import annotations

from corral.events.consumers import Subscriber
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.llm.service import calls, slots
from corral_plugins.llm.service.calls import PayloadStore
from corral_plugins.llm.service.provider_admin import REFRESH_JOB, ProviderChecks
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS

GRACE_SECONDS = 60
DELETE_PAYLOADS_JOB = "llm.delete_payloads_of_purged_user"
MINUTE, HOUR, DAY = 60, 3600, 86_400


def fail_abandoned_calls(settings: Settings) -> None:
    """Mark calls as failed if the process that made them has died, and delete expired concurrency slots."""
    calls.fail_abandoned(settings.get(TOTAL_TIMEOUT_SECONDS) + GRACE_SECONDS)
    slots.delete_expired()


def delete_expired_payloads(payloads: PayloadStore) -> None:
    """Delete stored requests and responses that are past their retention period."""
    payloads.delete_expired()


async def refresh_models(checks: ProviderChecks) -> None:
    """Fetch the model lists of all providers."""
    await checks.refresh_all_models()


async def refresh_provider(provider: str, checks: ProviderChecks) -> None:
    """Fetch the model list of one provider."""
    await checks.refresh_models_by_name(provider)


def on_user_purged(event: LoggedEvent) -> None:
    """Enqueue the deletion of a purged user's stored requests and responses.

    The calls themselves are kept, because usage totals include them.
    """
    enqueue(DELETE_PAYLOADS_JOB, user_id=event.object_id)


def delete_payloads_of_purged_user(user_id: str, payloads: PayloadStore) -> None:
    """Delete a batch of a purged user's stored requests and responses.

    If more might remain, enqueue another job.
    """
    if payloads.delete_of_user(user_id):
        enqueue(DELETE_PAYLOADS_JOB, user_id=user_id)


JOBS = (Job(REFRESH_JOB, refresh_provider, max_attempts=1), Job(DELETE_PAYLOADS_JOB, delete_payloads_of_purged_user))
SUBSCRIBERS = (Subscriber("llm.users", ("user.purged",), on_user_purged),)
SCHEDULES = (
    Schedule("llm.sweep", MINUTE, fail_abandoned_calls),
    Schedule("llm.prune", HOUR, delete_expired_payloads),
    Schedule("llm.refresh_models", DAY, refresh_models),
)
