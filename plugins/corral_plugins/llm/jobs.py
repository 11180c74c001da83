"""Background work of the gateway."""

from __future__ import annotations

from corral.events.consumers import Subscriber
from corral.events.log import Record
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.llm.service import calls, slots
from corral_plugins.llm.service.payloads import Payloads
from corral_plugins.llm.service.upkeep import REFRESH_JOB, Upkeep
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS

GRACE_SECONDS = 60
FORGET_JOB = "llm.forget_payloads"
MINUTE, HOUR, DAY = 60, 3600, 86_400


def sweep(settings: Settings) -> None:
    """Calls that nobody will settle any more are `failed`; places of dead processes are deleted."""
    calls.sweep(settings.get(TOTAL_TIMEOUT_SECONDS) + GRACE_SECONDS)
    slots.sweep()


def prune(payloads: Payloads) -> None:
    """Payloads that are kept no longer are deleted."""
    payloads.prune()


async def refresh_models(upkeep: Upkeep) -> None:
    """Every provider is asked for its models."""
    await upkeep.refresh_all()


async def refresh_provider(provider: str, upkeep: Upkeep) -> None:
    """One provider is asked for its models."""
    await upkeep.refresh_named(provider)


def forget_person(event: Record) -> None:
    """Somebody was purged: what was kept of their calls is deleted; the calls themselves stay, for the sums."""
    enqueue(FORGET_JOB, user_id=event.object_id)


def forget_payloads(user_id: str, payloads: Payloads) -> None:
    """Delete the payloads of a purged person, in chunks."""
    if payloads.forget(user_id):
        enqueue(FORGET_JOB, user_id=user_id)


JOBS = (Job(REFRESH_JOB, refresh_provider, max_attempts=1), Job(FORGET_JOB, forget_payloads))
SUBSCRIBERS = (Subscriber("llm.people", ("user.purged",), forget_person),)
SCHEDULES = (
    Schedule("llm.sweep", MINUTE, sweep),
    Schedule("llm.prune", HOUR, prune),
    Schedule("llm.refresh_models", DAY, refresh_models),
)
