"""The work queue, which assigns pull requests and issues (threads) to processes, and selects the next delivery or post.

The holder of a thread's lease processes the thread's deliveries and posts in order. A unit of work that stores a new
delivery or post also queues a job for the thread (`wake`). The holder checks for more work while it holds a lock on the
thread's row. If work arrives just before the holder releases the thread, either the holder finds the work, or the job
that was queued with the work processes it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from peewee import fn

from corral import clock
from corral.database.unit import locked
from corral.errors import ExpectedFailure
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral_github.models import Delivery, Post, Repository, Thread

WORK_JOB = "github.work"
ATTEMPT_SECONDS = 90.0
"""The time limit for processing one delivery or post, in seconds.

The limit is well below the duration of a lease, so that two attempts never overlap.
"""
LEASE_SECONDS = ATTEMPT_SECONDS + 30
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 900.0
HELD_SECONDS = 60.0
"""The number of seconds after which posts that wait because the kill switch is engaged are tried again."""
ALARMING_FAILURES = 3
GIVE_UP_SECONDS = 7 * 86_400.0
BATCH_SIZE = 200


class LeaseLost(ExpectedFailure):
    """Raised if another process has taken the lease on the thread (a pull request or an issue)."""


class ThreadLease(msgspec.Struct, frozen=True):
    """A lease on a thread (a pull request or an issue), whose holder alone processes the thread."""

    thread_id: str
    lease: str


class WorkItem(msgspec.Struct, frozen=True):
    """A pending delivery or post, with its thread and repository. Either `delivery` or `post` is set."""

    claimed: ThreadLease
    repository: Repository
    thread: Thread
    delivery: Delivery | None
    post: Post | None


def wake(thread_id: str) -> bool:
    """Queue a job for a thread (a pull request or an issue). If the thread has no due time, set it to now.

    Runs in the caller's unit of work. Return False if the thread was deleted. Otherwise, the thread cannot be deleted
    before the unit of work ends.

    The row is locked even if it does not change, so that the holder's last check for work runs either before or after
    this unit of work. An UPDATE with a condition on `run_at` would not wait for a holder that is about to release the
    thread.
    """
    due = Thread.update(run_at=fn.COALESCE(Thread.run_at, clock.now()))
    if not due.where(Thread.id == thread_id).execute():
        return False
    enqueue(WORK_JOB, thread_id=thread_id)
    return True


def claim(thread_id: str) -> ThreadLease | None:
    """Take the lease on a thread (a pull request or an issue).

    Return None if no work is due, or if another process holds the lease.
    """
    now, claimed = clock.now(), ThreadLease(thread_id, new_id())
    is_free = Thread.lease_until.is_null() | (Thread.lease_until < now)
    taken = Thread.update(lease=claimed.lease, lease_until=clock.now(LEASE_SECONDS))
    is_mine = taken.where((Thread.id == thread_id) & (Thread.run_at <= now) & is_free).execute()
    return claimed if is_mine else None


def lock_leased_thread(claimed: ThreadLease) -> Thread:
    """Lock and return the thread. Raise `LeaseLost` if another process has taken the lease."""
    mine = (Thread.id == claimed.thread_id) & (Thread.lease == claimed.lease)
    row: Thread | None = locked(Thread.select().where(mine)).first()
    if row is None:
        raise LeaseLost(f"Another process is working on the thread {claimed.thread_id}.")
    return row


def next_work(claimed: ThreadLease, *, holds_posts: bool) -> WorkItem | None:
    """Return the next delivery or post of a thread, and renew the lease.

    If nothing can be processed now, release the thread and return None. The work of a disabled repository waits. If
    `holds_posts` is set, posts wait too.
    """
    thread = lock_leased_thread(claimed)
    repository: Repository | None = Repository.get_or_none(Repository.id == thread.repository_id)
    if repository is None:  # it was disconnected while the first delivery about the thread was stored
        Thread.delete().where(Thread.id == thread.id).execute()
        Delivery.delete().where(Delivery.thread_id == thread.id).execute()
        return None
    delivery = _oldest_pending(Delivery, thread.id)
    post = None if delivery is not None else _oldest_pending(Post, thread.id)
    if delivery is None and post is None:
        _release_lease(thread, run_at=None, failures=0)
        return None
    if not repository.enabled:
        _pause_thread(thread, LONGEST_PAUSE_SECONDS)
        return None
    if post is not None and holds_posts:
        _pause_thread(thread, HELD_SECONDS)
        return None
    if repository.paused_until is not None and repository.paused_until > clock.now():
        _pause_thread(thread, clock.parse_instant(repository.paused_until) - clock.time_s())
        return None
    Thread.update(lease_until=clock.now(LEASE_SECONDS)).where(Thread.id == thread.id).execute()
    if post is not None:
        Post.update(attempts=Post.attempts + 1).where(Post.id == post.id).execute()
    return WorkItem(claimed, repository, thread, delivery, post)


def finish(item: WorkItem, status: str, detail: str | None, **changes: Any) -> None:
    """Record the outcome of a delivery or a post.

    Runs in the caller's unit of work, which must have locked the thread and made all related changes.
    """
    ended = {"status": status, "detail": detail, "finished_at": clock.now(), **changes}
    if item.delivery is not None:
        is_mine = (Delivery.id == item.delivery.id) & (Delivery.status == "pending")
        Delivery.update(facts=None, **ended).where(is_mine).execute()
    elif item.post is not None:
        Post.update(ended).where((Post.id == item.post.id) & (Post.status == "pending")).execute()
    if status != "failed":
        Thread.update(failures=0).where(Thread.id == item.thread.id).execute()
        Repository.update(last_error=None).where(
            (Repository.id == item.repository.id) & Repository.last_error.is_null(False)
        ).execute()


def fail(item: WorkItem, detail: str) -> None:
    """Record the permanent failure of a delivery or a post. Runs in the caller's unit of work.

    The `facts` of a delivery are not cleared, so that the delivery can be retried.
    """
    lock_leased_thread(item.claimed)
    ended = {"status": "failed", "detail": detail, "finished_at": clock.now()}
    if item.delivery is not None:
        Delivery.update(ended).where(Delivery.id == item.delivery.id).execute()
    elif item.post is not None:
        Post.update(ended).where(Post.id == item.post.id).execute()
    _alert_admins(item, detail, is_lost=True)


def postpone(item: WorkItem, detail: str, pause_seconds: float | None) -> None:
    """Postpone a delivery or a post that the code host did not accept. The delay grows with each failure.

    After a week, record a permanent failure instead.
    """
    thread = lock_leased_thread(item.claimed)
    began = (item.delivery or item.post).waiting_since  # type: ignore[union-attr]  # one of the two is set
    if began < clock.now(-GIVE_UP_SECONDS):
        fail(item, f"Corral gave up after {GIVE_UP_SECONDS / 86_400:.0f} days. {detail}")
        _pause_thread(thread, 0.0)
        return
    failures = thread.failures + 1
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 10))
    changes: dict[str, Any] = {"last_error": detail}
    if pause_seconds is not None:
        pause = max(pause_seconds, 1.0)
        changes["paused_until"] = clock.now(pause)
    Repository.update(changes).where(Repository.id == item.repository.id).execute()
    Thread.update(failures=failures).where(Thread.id == thread.id).execute()
    if failures >= ALARMING_FAILURES and pause_seconds is None:
        _alert_admins(item, detail, is_lost=False)
    _pause_thread(thread, pause)


def enqueue_due() -> int:
    """Queue jobs for pull requests and issues whose due work no process is handling, for example after a crash.

    Return the number of queued jobs.
    """
    now = clock.now()
    is_free = Thread.lease_until.is_null() | (Thread.lease_until < now)
    found = Thread.select(Thread.id).where((Thread.run_at <= now) & is_free).order_by(Thread.run_at).limit(BATCH_SIZE)
    ids = [row.id for row in found]
    for thread_id in ids:
        enqueue(WORK_JOB, thread_id=thread_id)
    return len(ids)


def _oldest_pending(model: Any, thread_id: str) -> Any:
    waiting = (model.thread_id == thread_id) & (model.status == "pending")
    return model.select().where(waiting).order_by(model.id).first()


def _pause_thread(thread: Thread, seconds: float) -> None:
    _release_lease(thread, run_at=clock.now(seconds))
    enqueue(WORK_JOB, delay_seconds=seconds, thread_id=thread.id)


def _release_lease(thread: Thread, **changes: Any) -> None:
    Thread.update(lease=None, lease_until=None, **changes).where(Thread.id == thread.id).execute()


def _alert_admins(item: WorkItem, detail: str, *, is_lost: bool) -> None:
    """Alert admins to a failing delivery or post, at most once an hour for each repository."""
    name = item.repository.name
    title = f"A delivery or a post of {name} failed" if is_lost else f"Work on {name} keeps failing"
    kind = "github_failed" if is_lost else "github_unreachable"
    alert = SystemAlert(kind=kind, severity="warning", title=title, detail=f"{detail} See `corral github show {name}`.")
    raise_alert(alert, object=("github_repository", item.repository.id))
