"""What another process does to the same rows at the same time. Only PostgreSQL runs units of work at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import ALLOWED, PLUGINS, World
from corral_github.models import Post, Repository, Thread
from corral_github.plugin import GitHubPlugin
from corral_github.service.posts import queue_comment
from recorded_github import RecordedGitHub

from corral import clock
from corral.ids import new_id
from corral.testing.kit import make_kernel

pytestmark = pytest.mark.postgres

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Rival(World):
    """A world, and a transaction of another process."""

    other_process: psycopg.Connection
    watcher: psycopg.Connection

    async def until_blocked(self, running: asyncio.Future[Any]) -> None:
        """Wait until a unit of work waits for the other process, or the operation is over."""
        ends = time.monotonic() + 60
        while not self.watcher.execute(WAITING).fetchone()[0] and not running.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)


@pytest.fixture
async def rival(tmp_path: Path, postgres_server: Any, github: RecordedGitHub) -> AsyncIterator[Rival]:
    url = postgres_server.unused_database_url()
    async with make_kernel(tmp_path, database_url=url, plugins=[*PLUGINS, GitHubPlugin], config=ALLOWED) as kit:
        made = Rival(kit, github)
        await made.build()
        made.other_process, made.watcher = psycopg.connect(url), psycopg.connect(url, autocommit=True)
        yield made
        made.other_process.close()
        made.watcher.close()
    postgres_server.drop_database(url)


async def test_a_post_wakes_a_thread_that_its_holder_is_about_to_release(rival: Rival) -> None:
    await rival.issue()
    rival.other_process.execute("UPDATE github_threads SET run_at = NULL")  # it has looked for work, and found none
    thread = await rival.kit.work(Thread.get, read=True)
    queue = rival.kit.work(lambda: queue_comment(thread, {"text": "Hello."}, source="a test"))
    queued = asyncio.ensure_future(queue)
    await rival.until_blocked(queued)
    rival.other_process.commit()
    await queued
    assert (await rival.repository())["waiting"] == 1


async def test_a_retry_ends_the_pause_of_a_thread_that_its_holder_is_about_to_release(rival: Rival) -> None:
    await rival.issue()
    await rival.kit.work(lambda: Thread.update(lease=new_id(), lease_until=clock.now(60)).execute())
    later = clock.now(900)  # the host did not answer
    rival.other_process.execute("UPDATE github_threads SET lease = NULL, lease_until = NULL, run_at = %s", (later,))
    retry = asyncio.ensure_future(rival.admin.post(f"/github/repositories/{rival.repository_id}/retry"))
    await rival.until_blocked(retry)
    rival.other_process.commit()
    assert (await retry).status == 200
    assert (await rival.kit.work(Thread.get, read=True)).run_at < later


async def test_a_post_that_is_queued_while_its_repository_is_disconnected_is_deleted_as_well(rival: Rival) -> None:
    await rival.issue()
    rival.other_process.execute("UPDATE github_threads SET run_at = run_at")  # as `wake` does
    rival.other_process.execute(
        "INSERT INTO github_posts (id, repository_id, thread_id, kind, source, content, status, attempts, created_at,"
        " waiting_since) SELECT id, repository_id, id, 'comment', 'a test', '{}', 'pending', 0, run_at, run_at"
        " FROM github_threads"
    )
    disconnect = asyncio.ensure_future(rival.admin.delete(f"/github/repositories/{rival.repository_id}"))
    await rival.until_blocked(disconnect)
    rival.other_process.commit()
    assert (await disconnect).status == 204
    assert await rival.kit.work(Post.select().count, read=True) == 0


async def test_a_pause_that_the_worker_stores_survives_a_change_of_its_repository(rival: Rival) -> None:
    await rival.issue()
    later = clock.now(900)
    rival.other_process.execute("UPDATE github_repositories SET paused_until = %s", (later,))
    change = asyncio.ensure_future(
        rival.admin.patch(f"/github/repositories/{rival.repository_id}", {"issue_labels": ["other"]})
    )
    await rival.until_blocked(change)
    rival.other_process.commit()
    assert (await change).status == 200
    assert (await rival.kit.work(Repository.get, read=True)).paused_until == later
