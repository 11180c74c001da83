"""Commands of agents: their environment, their limits, and that no process outlives them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from corral_plugins.workers.node.tools import sandbox
from corral_plugins.workers.node.tools.builtin import TOOLS
from corral_plugins.workers.node.tools.workspace import Workspace, Workspaces


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspaces(tmp_path).open_workspace("t1")


async def shell(space: Workspace, command: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = await TOOLS["shell.run"].parse_arguments({"command": command, **more}).run(space)
    return found


def pids(space: Workspace) -> list[int]:
    """The processes whose ids were written to the workspace."""
    return [int(line) for line in (space.path / "pids").read_text().split()]


def alive(ids: list[int]) -> list[int]:
    return [pid for pid in ids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_status_and_output(space: Workspace) -> None:
    done = await shell(space, "echo out; echo err >&2; exit 3")
    assert done == {"exit_code": 3, "output": "out\nerr\n", "timed_out": False}
    assert (await shell(space, "kill -9 $$"))["exit_code"] == 137
    assert (await shell(space, "nothing-like-this"))["exit_code"] == 127
    assert (await shell(space, "cat; yes | head -1"))["output"] == "y\n"


async def test_nothing_of_the_workers_environment_is_there(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_WORKER_TOKEN", "crg_secret")
    (space.path / "cwd").touch()
    seen = (await shell(space, "env; ls"))["output"].split()
    names = {line.partition("=")[0] for line in seen if "=" in line}
    assert names <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}  # the last four are the shell's own
    assert f"HOME={space.path}" in seen
    assert "cwd" in seen


async def test_python_runs_apart_from_the_workers_own(space: Workspace) -> None:
    (space.path / "json.py").write_text("raise SystemExit('taken from the workspace')")
    code = "import json, sys; print(json.dumps([sys.argv, sys.flags.isolated]))"
    done = await TOOLS["python.run"].parse_arguments({"code": code}).run(space)
    assert done == {"exit_code": 0, "output": '[["-c"], 1]\n', "timed_out": False}


async def test_the_time_is_limited(space: Workspace) -> None:
    began = time.monotonic()
    done = await shell(space, "trap '' TERM; echo before; echo $$ > pids; sleep 60", timeout_seconds=1)
    assert time.monotonic() - began < 50
    assert done == {"exit_code": None, "output": "before\n", "timed_out": True}
    assert alive(pids(space)) == []


async def test_a_command_may_end_itself_when_its_time_is_over(space: Workspace) -> None:
    done = await shell(space, "trap 'echo bye; exit' TERM; sleep 60 & wait", timeout_seconds=1)
    assert done == {"exit_code": None, "output": "bye\n", "timed_out": True}


async def test_what_it_left_behind_ends_with_it(space: Workspace) -> None:
    """Processes in the background, in a session of their own, and orphaned twice."""
    command = "sleep 60 & echo $! > pids; setsid sh -c 'echo $$ >> pids; sleep 60' & (setsid sleep 60 &); sleep 0.3"
    done = await shell(space, command)
    assert done["exit_code"] == 0
    assert len(pids(space)) == 2
    await until(lambda: alive(pids(space)) == [])
    left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(space.path)]
    assert left == []


async def test_memory_and_files_are_limited(space: Workspace) -> None:
    done = await TOOLS["python.run"].parse_arguments({"code": "bytearray(8 * 1024**3)"}).run(space)
    assert done["exit_code"] == 1
    assert "MemoryError" in done["output"]
    done = await shell(space, f"head -c {sandbox.LIMITS['RLIMIT_FSIZE'] + 1} /dev/zero > big")
    assert done["exit_code"] != 0
    assert (space.path / "big").stat().st_size <= sandbox.LIMITS["RLIMIT_FSIZE"]
    (space.path / "big").unlink()


@pytest.mark.parametrize("made", ["'a'", "chr(1)", "chr(10)", "'€'"])
async def test_output_is_cut_in_its_middle(made: str, space: Workspace) -> None:
    code = f"print('first'); print({made} * 300_000); print('last')"
    done = await TOOLS["python.run"].parse_arguments({"code": code}).run(space)
    assert done["output"].startswith("first\n")
    assert done["output"].endswith("last\n")
    assert "bytes left out]" in done["output"]
    assert len(msgspec.json.encode(done)) <= 64 * 1024


async def test_a_cancelled_call_ends_everything(space: Workspace) -> None:
    running = asyncio.ensure_future(shell(space, "echo $$ > pids; sleep 60"))
    await until(lambda: (space.path / "pids").exists() and pids(space))
    began = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - began < 50
    assert alive(pids(space)) == []


async def test_a_command_that_kills_its_parent_leaves_no_processes(space: Workspace) -> None:
    """Its processes, also those of other sessions, fall to the process of the task, which ends them."""
    code = (
        "import asyncio, pathlib, sys\n"
        "from corral_plugins.workers.node.tools import sandbox\n"
        "from corral_plugins.workers.node.tools.workspace import Workspace\n"
        "sandbox.adopt_orphans()\n"
        "script = 'echo $$ > pids; setsid sleep 60 & echo $! >> pids; sleep 60 & echo $! >> pids; '\n"
        "script += 'kill -9 $PPID; sleep 60'\n"
        "argv = ['/bin/sh', '-c', script]\n"
        "for turn in range(2):\n"
        "    print(asyncio.run(sandbox.run_command(argv, Workspace(pathlib.Path(sys.argv[1])), 20)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["kernel", "plugins"])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(space.path), env=env, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert output.decode().count("'exit_code': -9") == 2
    assert len(pids(space)) == 3
    assert alive(pids(space)) == []


async def test_a_killed_worker_leaves_no_command(space: Workspace, tmp_path: Path) -> None:
    """The worker is killed and cannot clean up; the sandbox runner sees its input close."""
    code = (
        "import asyncio, pathlib, sys\n"
        "from corral_plugins.workers.node.tools import sandbox\n"
        "from corral_plugins.workers.node.tools.workspace import Workspace\n"
        "argv = ['/bin/sh', '-c', 'echo $$ > pids; sleep 60']\n"
        "asyncio.run(sandbox.run_command(argv, Workspace(pathlib.Path(sys.argv[1])), 60))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["kernel", "plugins"])}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(space.path), env=env)
    await until(lambda: (space.path / "pids").exists() and pids(space), 20)
    process.kill()
    await process.wait()
    await until(lambda: alive(pids(space)) == [], 5)
