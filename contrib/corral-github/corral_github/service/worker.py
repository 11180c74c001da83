"""Processes the deliveries and posts of a thread (a pull request or an issue) one after another."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable

from corral import clock
from corral.database.engine import Work
from corral.errors import NotFound, Problem
from corral.redact.redactor import Redactor
from corral_core.accounts.api import Accounts
from corral_github.models import Post
from corral_github.service import posts, work_queue
from corral_github.service.issues import Issues
from corral_github.service.pull_requests import PullRequests
from corral_github.service.rest_client import HostFailure, HostRefusal, Json, RepositoryClient, RepositoryClients
from corral_github.service.work_queue import ATTEMPT_SECONDS, LeaseLost, ThreadLease, WorkItem
from corral_plugins.admin.api import KillSwitch
from corral_plugins.tasks.api import Tasks

log = logging.getLogger("corral.github")
UNPROCESSABLE = 422
CLOCK_SECONDS = 600.0


class ThreadWorker:
    """Handles deliveries and sends posts. Any number of processes may call `run` at the same time."""

    switch: KillSwitch | None

    def __init__(
        self,
        work: Work,
        hosts: RepositoryClients,
        redactor: Redactor,
        accounts: Accounts,
        tasks: Tasks,
        pulls: PullRequests,
        issues: Issues,
    ) -> None:
        self._work, self._hosts, self._redactor = work, hosts, redactor
        self._accounts, self._tasks, self._pulls, self._issues = accounts, tasks, pulls, issues

    async def run(self, thread_id: str) -> None:
        """Process all due deliveries and posts of a pull request or an issue, unless another process is doing so."""
        claimed = await self._work(lambda: work_queue.claim(thread_id))
        if claimed is None:
            return
        try:
            while (item := await self._work(lambda: self._next(claimed))) is not None:
                if not await self._process(item):
                    return
        except LeaseLost as lost:
            log.warning("lease lost", extra={"reason": str(lost)})

    def _next(self, claimed: ThreadLease) -> WorkItem | None:
        holds = self.switch is not None and (state := self.switch.state()).engaged and state.hold_deliveries
        return work_queue.next_work(claimed, holds_posts=holds)

    async def _process(self, item: WorkItem) -> bool:
        """Process one delivery or post. Return False if the thread must wait for the code host."""
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                await self._work(lambda: self._check_rights(item), read=True)
                await self._handler(item)(item)
        except (HostFailure, TimeoutError) as failure:
            detail = str(failure) or "The attempt took too long."
            pause = failure.pause_seconds if isinstance(failure, HostFailure) else None
            await self._work(lambda: work_queue.postpone(item, detail, pause))
            return False
        except LeaseLost:
            raise
        except Problem as problem:
            if problem.status >= 500:  # such as a database that is busy, or a sealed vault
                detail = problem.detail
                await self._work(lambda: work_queue.postpone(item, detail, None))
                return False
            detail = self._redactor.redact(problem.detail)
            await self._work(lambda: work_queue.fail(item, detail))
        except HostRefusal as refusal:
            detail = refusal.detail
            await self._work(lambda: work_queue.fail(item, detail))
        except Exception as error:
            log.exception("a delivery or a post failed", extra={"thread_id": item.thread.id})
            detail = f"An unexpected error: {type(error).__name__}. See the log."
            await self._work(lambda: work_queue.postpone(item, detail, None))
            return False
        return True

    def _check_rights(self, item: WorkItem) -> None:
        """Raise `InsufficientRights` unless the admin who owns the repository may still manage repositories."""
        self._accounts.principal_of(item.repository.owner_id, "github.manage")

    def _handler(self, item: WorkItem) -> Callable[[WorkItem], Awaitable[None]]:
        if item.delivery is None:
            return self._send
        return self._pulls.handle if item.thread.kind == "pull" else self._issues.handle

    async def _send(self, item: WorkItem) -> None:
        """Send a post exactly once.

        The number of attempts was committed beforehand. If this is not the first attempt, an earlier request may have
        reached the code host without being recorded, so Corral first searches the code host for the post.
        """
        post = item.post
        assert post is not None
        forms = await self._bodies_to_send(item, post)
        host = await self._hosts.open(item.repository)
        try:
            url = await self._find(host, item, post) if post.attempts > 0 else None
            if url is None:
                url = await self._first_accepted(host, item, post, forms)
        finally:
            await host.close()
        await self._work(functools.partial(_record_posted, item, url))

    async def _bodies_to_send(self, item: WorkItem, post: Post) -> list[Json]:
        """Return the alternative bodies of the post, best first.

        The redactor removes credentials from these bodies, including credentials that became known to Corral only after
        the post was queued.
        """
        if post.kind == "review":
            made = posts.review_forms(post)
        else:
            text = post.content.get("text") or await self._work(lambda: self._task_result_text(item, post), read=True)
            made = [{"body": posts.comment_text(post, text)}]
        found: list[Json] = await asyncio.to_thread(self._redactor.redact_json, made)
        return found

    def _task_result_text(self, item: WorkItem, post: Post) -> str:
        by = self._accounts.principal_of(item.repository.owner_id, "tasks.read")
        try:
            return posts.result_text(self._tasks.get(post.content["task_id"], by=by))
        except NotFound:
            return "The task was deleted."

    async def _find(self, host: RepositoryClient, item: WorkItem, post: Post) -> str | None:
        marker = posts.marker_of(post)
        if post.kind == "review":
            return await host.find_review(item.thread.number, marker)
        return await host.find_comment(item.thread.number, marker, _earlier(post.created_at))

    @staticmethod
    async def _first_accepted(host: RepositoryClient, item: WorkItem, post: Post, forms: list[Json]) -> str:
        number = item.thread.number
        if post.kind == "comment":
            return await host.post_comment(number, forms[0]["body"])
        for form in forms[:-1]:
            try:
                return await host.post_review(number, form)
            except HostRefusal as refusal:
                if refusal.status != UNPROCESSABLE:
                    raise
                log.info(
                    "the host rejected one form of a review, so the next form is tried",
                    extra={"post": post.id, "reason": refusal.detail},
                )
        return await host.post_review(number, forms[-1])


def _record_posted(item: WorkItem, url: str) -> None:
    work_queue.lock_leased_thread(item.claimed)
    work_queue.finish(item, "posted", None, url=url)


def _earlier(instant: str) -> str:
    """Return a time slightly before `instant`, because the code host's clock may be behind."""
    return clock.format_instant(clock.parse_instant(instant) - CLOCK_SECONDS)[:19] + "Z"
