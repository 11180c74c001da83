"""The embedded worker: one, however many processes share a database."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from corral.database.engine import Database
from corral.database.leases import lease_holder
from corral.database.unit import SYSTEM_CONTEXT, UnitContext
from corral.errors import Unavailable
from corral_plugins.workers.service import embedded
from corral_plugins.workers.service.embedded import EmbeddedLease, relay_output, remove_orphaned_folders

ADDRESS = "http://127.0.0.1:8000"
T = TypeVar("T")


class Program:
    """Counts the running instances."""

    running = 0
    begun = 0

    async def run(self) -> None:
        Program.running += 1
        Program.begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            Program.running -= 1


async def until(wanted: Any) -> None:
    async with asyncio.timeout(60):
        while not wanted():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_one_runs_and_another_follows(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="corral.workers")
    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(Program, "begun", 0)
    work = fleet.kit.kernel.database.work
    leases = [EmbeddedLease(work, Program, f"http://127.0.0.1:{port}") for port in (8000, 8001)]
    tasks = [asyncio.create_task(lease.hold_lease()) for lease in leases]
    try:
        await until(lambda: Program.running == 1)
        await asyncio.sleep(0.3)
        assert (Program.running, Program.begun) == (1, 1)
        assert [each.levelname for each in caplog.records if "runs the embedded worker" in each.message] == ["INFO"]
        for lease in leases:
            await lease.release_lease()
            await asyncio.sleep(0.3)
        await until(lambda: Program.running == 0)
        assert Program.begun >= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert Program.running == 0


async def test_a_process_of_the_same_server_waits_without_a_message(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as the new process of a reload, which starts while the old one still holds the lease."""
    caplog.set_level("INFO", logger="corral.workers")
    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(Program, "begun", 0)
    old, new = (EmbeddedLease(fleet.kit.kernel.database.work, Program, ADDRESS) for _ in range(2))
    tasks = [asyncio.create_task(old.hold_lease())]
    try:
        await until(lambda: Program.running == 1)
        tasks.append(asyncio.create_task(new.hold_lease()))
        await asyncio.sleep(0.3)
        await old.release_lease()
        await until(lambda: Program.begun == 2)
        assert not [each.message for each in caplog.records if "runs the embedded worker" in each.message]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_database_that_is_away_for_a_moment_ends_no_work(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(embedded, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(Program, "begun", 0)
    away, asked = asyncio.Event(), 0

    async def work(fn: Callable[[], T], *, entry: UnitContext = SYSTEM_CONTEXT, read: bool = False) -> T:
        nonlocal asked
        asked += 1
        if away.is_set():
            raise Unavailable("The database is away.")
        database: Database = fleet.kit.kernel.database
        return await database.work(fn, entry=entry, read=read)

    lease = EmbeddedLease(work, Program, ADDRESS)
    task = asyncio.create_task(lease.hold_lease())
    try:
        await until(lambda: Program.running == 1)
        away.set()
        tries = asked
        await until(lambda: asked > tries + 2)
        away.clear()
        tries = asked
        await until(lambda: asked > tries + 2)
        assert (Program.running, Program.begun) == (1, 1)
        away.set()
        with pytest.raises(Unavailable):  # longer than the lease: another process may have it now
            async with asyncio.timeout(60):
                await task
        assert Program.running == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_none_starts_once_the_lease_is_released(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(Program, "begun", 0)
    acquiring, going_on = asyncio.Event(), asyncio.Event()

    async def work(fn: Callable[[], T], *, entry: UnitContext = SYSTEM_CONTEXT, read: bool = False) -> T:
        if not acquiring.is_set():
            acquiring.set()
            await going_on.wait()
        database: Database = fleet.kit.kernel.database
        return await database.work(fn, entry=entry, read=read)

    lease = EmbeddedLease(work, Program, ADDRESS)
    task = asyncio.create_task(lease.hold_lease())
    await acquiring.wait()
    releasing = asyncio.create_task(lease.release_lease())
    await asyncio.sleep(0.2)
    going_on.set()
    await releasing
    await asyncio.sleep(0.2)
    assert Program.running == 0
    assert await fleet.work(lambda: lease_holder(embedded.LEASE)) is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.one_engine
async def test_a_failing_program_is_told_to_the_supervisor(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)

    class Broken:
        async def run(self) -> None:
            raise OSError("no such program")

    lease = EmbeddedLease(fleet.kit.kernel.database.work, Broken, ADDRESS)
    with pytest.raises(OSError, match="no such program"):
        async with asyncio.timeout(60):
            await lease.hold_lease()


@pytest.mark.one_engine
@pytest.mark.parametrize("on", [True, False])
async def test_it_starts_when_the_server_serves_unless_it_is_off(
    make_fleet: Any, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    made: list[tuple[Any, ...]] = []

    class Recorded(Program):
        def __init__(self, *arguments: Any, allow: list[str]) -> None:
            made.append((*arguments, allow))

    monkeypatch.setattr(embedded, "EmbeddedWorker", Recorded)
    section = {"embedded": on, "embedded_max_agents": 3, "embedded_allow": ["workspace.read"]}
    fleet = await make_fleet(config={"plugins.workers": section})
    kernel = fleet.kit.kernel
    await kernel.announce_serving("http://127.0.0.1:9")
    if not on:
        await asyncio.sleep(0.3)
        assert made == []
        return
    await until(lambda: made)
    address, make_key, max_agents, allow = made[0]
    assert (address, max_agents, allow) == ("http://127.0.0.1:9", 3, ["workspace.read"])
    key = fleet.client(await make_key())
    assert (await key.post("/workers/register", {"name": "embedded"})).json()["is_approved"] is True
    await kernel.drain(5)
    assert Program.running == 0


@pytest.mark.one_engine
async def test_who_must_change_the_password_first_beats_for_nobody(fleet: Any) -> None:
    from corral_core.accounts.models import UserRow

    member = await fleet.kit.as_user("member")
    worker = await fleet.worker(by=member)
    me = UserRow.id == member.user["id"]
    await fleet.work(lambda: UserRow.update(must_change_password=True).where(me).execute())
    fleet.kit.kernel.credentials.forget(lambda principal: True)
    answer = await member.post(f"/workers/{worker.user['id']}/heartbeat")
    assert answer.code == "password_change_required"


async def test_one_that_was_killed_on_this_machine_gives_way_at_once(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from corral.database.leases import acquire_lease, release_lease

    monkeypatch.setattr(embedded, "RENEW_SECONDS", 0.05)
    work = fleet.kit.kernel.database.work
    killed = f"{socket.gethostname()[:30]}|{2**22 + 1}|former"  # no process has so high a number
    elsewhere = "another-machine|1|former"
    for holder, taken in ((elsewhere, 0), (killed, 1)):
        await work(lambda holder=holder: release_lease(embedded.LEASE, elsewhere))
        assert await work(lambda holder=holder: acquire_lease(embedded.LEASE, holder, 15.0))
        lease = EmbeddedLease(work, Program, ADDRESS)
        task = asyncio.create_task(lease.hold_lease())
        await asyncio.sleep(0.5)
        await until(lambda taken=taken: Program.running == taken)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


HOLDS = """
from corral_plugins.workers.service.embedded import _temporary_folder
with _temporary_folder() as folder:
    print(folder, flush=True)
    input()
"""


def test_folders_of_killed_servers_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (foreign := tmp_path / "corral-worker-of-no-owner").mkdir()
    environ = {**os.environ, "TMPDIR": str(tmp_path)}

    def server() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDS]
        return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with server() as killed, server() as alive:
        left, held = (Path(str(each.stdout and each.stdout.readline()).strip()) for each in (killed, alive))
        (left / "workspaces" / "task").mkdir(parents=True)
        killed.kill()
        killed.wait()
        remove_orphaned_folders()
        assert not left.exists()
        assert held.is_dir()
        assert foreign.is_dir()
        alive.communicate("\n", timeout=60)
        assert not held.exists()


async def test_its_log_is_the_servers(caplog: pytest.LogCaptureFixture) -> None:
    lines = asyncio.StreamReader(limit=100)
    lines.feed_data(b"INFO corral.worker: registered\nWARNING httpx2: no\xff answer\n  of the server\nINFO x: ")
    lines.feed_data(b"9" * 200 + b"\nERROR corral.worker: the end")
    lines.feed_eof()
    with caplog.at_level(logging.INFO):
        await relay_output(lines)
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("corral.worker", "INFO", "registered"),
        ("httpx2", "WARNING", "no\ufffd answer"),
        ("httpx2", "WARNING", "  of the server"),
        ("corral.worker", "ERROR", "the end"),
    ]
