"""Background jobs and event handlers."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule
from corral_core.accounts.api import Accounts
from corral_github.models import Delivery, Post
from corral_github.service import posts, work_queue
from corral_github.service.worker import ThreadWorker
from corral_plugins.code_reviews.api import CodeReviews

DAY = 86_400.0
KEEP_SECONDS = 90 * DAY
BATCH_SIZE = 500


async def work_on_thread(thread_id: str, worker: ThreadWorker) -> None:
    """Process the pending deliveries and posts for a pull request or an issue."""
    await worker.run(thread_id)


def resume_threads() -> None:
    """Queue jobs for pull requests and issues whose due work no process is handling, for example after a crash."""
    work_queue.enqueue_due()


async def delete_old_rows(work: Work) -> None:
    """Delete deliveries and posts that were created more than 90 days ago and are no longer pending."""
    before = clock.now(-KEEP_SECONDS)
    for model in (Delivery, Post):
        while await work(lambda model=model: _delete_batch(model, before)) == BATCH_SIZE:  # type: ignore[misc]  # bound now
            pass


def _delete_batch(model: type[Delivery] | type[Post], before: str) -> int:
    old = model.select(model.id).where((model.created_at < before) & (model.status != "pending")).limit(BATCH_SIZE)
    return int(model.delete().where(model.id.in_(old)).execute())


def on_decision(event: LoggedEvent, reviews: CodeReviews, accounts: Accounts) -> None:
    """Queue a post that reports a decision on the code review of a pull request."""
    posts.queue_decision(event, reviews, accounts)


def on_task_ended(event: LoggedEvent) -> None:
    """Queue a post that reports the result of a task."""
    posts.queue_result(event)


JOBS = (Job(work_queue.WORK_JOB, work_on_thread, lease_seconds=3600),)
SCHEDULES = (
    Schedule("github.resume", 30.0, resume_threads),
    Schedule("github.prune", DAY, delete_old_rows),
)
