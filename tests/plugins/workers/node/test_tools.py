"""Tools of real workers against a real server: offered, permitted, run, and never run twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral_plugins.workers.node.tools import mcp

Site = Any  # of conftest.py

SOON = '"tasks.lease_seconds" = 10\n"tasks.ack_seconds" = 5\n"tasks.cancel_grace_seconds" = 10'


def scripts(folder: Path) -> dict[str, Any]:
    """The scripts of the server that tests of this module share."""
    work = [
        calls("workspace__write", path="in.txt", content="6*7"),
        calls("shell__run", command="echo $(($(cat in.txt))) > out.txt; pwd"),
        calls("workspace__read", path="out.txt"),
        calls("workspace__list"),
        {"text": "end"},
    ]
    return {
        "work": work,
        "code": [calls("python__run", code="print(6 * 7)"), {"text": "end"}],
        "touch": [calls("shell__run", command=f"touch {folder}/touched"), {"text": "end"}],
        "wait": [calls("shell__run", command=f"echo $$ > {folder}/waits; sleep 60"), {"text": "end"}],
        "note": [calls("shell__run", command=f"echo $$ >> {folder}/notes; sleep 60"), {"text": "end"}],
        "ask": [calls("human__ask", prompt="Which colour?"), {"match": "blue", "text": "so blue"}],
    }


def calls(name: str, *, seconds: float = 0, **arguments: Any) -> dict[str, Any]:
    """A scripted turn that calls one tool."""
    return {"tool_calls": [{"name": name, "arguments": arguments}], "delay_seconds": seconds}


def agent(site: Site, model: str, *tools: str) -> str:
    """Create an agent that may use these tools without approval."""
    found: str = site.agent(model, enabled_tools=list(tools), tool_policy=dict.fromkeys(tools, "allow"))
    return found


def recorded(site: Site, task_id: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = site.call("GET", f"/tasks/{task_id}/tool-calls?limit=200")["items"]
    return items


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.05)


def offered(site: Site) -> list[str]:
    (worker,) = site.call("GET", "/admin/workers")["items"]
    return sorted(tool["name"] for tool in worker["tools"])


def test_allowed_tools_are_offered_and_run(site: Site) -> None:
    names = ["workspace.write", "workspace.read", "workspace.list", "shell.run", "python.run"]
    site.worker("w1", *[part for name in names for part in ("--allow", name)])
    assert offered(site) == sorted(names)
    task = site.ended(site.task(agent(site, "work", *names)))
    assert task["result"] == {"text": "end"}, task
    done = recorded(site, task["id"])
    assert [each["tool"] for each in done] == ["workspace.write", "shell.run", "workspace.read", "workspace.list"]
    assert {each["status"] for each in done} == {"succeeded"}
    assert all(each["duration_ms"] is not None for each in done)
    folder = Path(done[1]["result"]["output"].strip())
    assert folder.name == task["id"]
    until(lambda: not folder.exists())  # the worker reports the end first
    assert done[2]["result"]["content"] == "42\n"
    assert [entry["name"] for entry in done[3]["result"]["entries"]] == ["in.txt", "out.txt"]
    task = site.ended(site.task(agent(site, "code", *names)))
    (call,) = recorded(site, task["id"])
    assert call["result"] == {"exit_code": 0, "output": "42\n", "timed_out": False}


def test_without_allow_nothing_runs_on_the_worker(site: Site) -> None:
    site.worker("w1", "--allow", "workspace.read")
    task = site.ended(site.task(agent(site, "touch", "shell.run")))
    assert task["result"] == {"text": "end"}, task
    assert not (site.folder / "touched").exists()


def test_a_worker_started_with_other_tools_says_so(site: Site) -> None:
    first = site.worker("w1", "--allow", "shell.run")
    assert offered(site) == ["shell.run"]
    assert first.stop() == 0
    site.worker("w1", "--allow", "workspace.list")
    until(lambda: offered(site) == ["workspace.list"])


def test_the_embedded_worker_brings_what_the_file_allows(make_site: Callable[..., Site]) -> None:
    turns = [calls("workspace__write", path="a.txt", content="x"), {"text": "end"}]
    config = '[plugins.workers]\nembedded_allow = ["workspace.write"]'
    site = make_site({"work": turns}, "--no-jobs", config=config)
    task = site.ended(site.task(agent(site, "work", "workspace.write")))
    assert task["result"] == {"text": "end"}, task
    assert offered(site) == ["workspace.write"]
    assert [each["status"] for each in recorded(site, task["id"])] == ["succeeded"]


def test_an_unknown_tool_cannot_be_allowed(run_corral: Callable[..., Any]) -> None:
    worker = run_corral("worker", "--url", "http://127.0.0.1:1", "--allow", "shell.walk")
    assert worker.popen.wait(60) == 2
    assert "shell.run" in worker.output


def test_workers_8_a_command_in_flight_is_not_run_twice(
    make_site: Callable[..., Site], gone: Any, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    site = make_site(
        {"work": [calls("shell__run", command=f"echo $$ >> {mark}; sleep 60"), {"text": "end"}]}, settings=SOON
    )
    first = site.worker("w1", "--allow", "shell.run")
    task_id = site.task(agent(site, "work", "shell.run"))
    until(mark.exists)
    family = first.tree()
    os.kill(first.popen.pid, signal.SIGKILL)
    assert gone(family)
    site.worker("w2", "--allow", "shell.run")
    task = site.ended(task_id)
    assert (task["status"], task["result"]) == ("completed", {"text": "end"})
    assert len(mark.read_text().split()) == 1
    (call,) = recorded(site, task_id)
    assert (call["status"], call["error"]["type"]) == ("failed", "outcome_unknown")


def test_workers_8_no_server_tool_runs_twice(make_site: Callable[..., Site], gone: Any) -> None:
    """The worker is killed at step 7 of 10; every step creates a task."""
    turns = [
        calls("tasks__create", title=f"child {n}", agent_role="nobody", seconds=4 if n == 7 else 0.1)
        for n in range(1, 10)
    ]
    site = make_site({"ten": [*turns, {"text": "end"}]}, settings=SOON)
    first = site.worker("w1")
    task_id = site.task(agent(site, "ten", "tasks.create"))
    until(lambda: len(site.calls(task_id)) == 7)
    family = first.tree()
    os.kill(first.popen.pid, signal.SIGKILL)
    assert gone(family)
    site.worker("w2")
    task = site.ended(task_id)
    assert (task["status"], task["result"]) == ("completed", {"text": "end"})
    children = site.call("GET", f"/tasks?parent_task_id={task_id}&limit=100")["items"]
    assert sorted(child["title"] for child in children) == [f"child {n}" for n in range(1, 10)]
    assert len(site.calls(task_id)) <= 11


def test_cancel_ends_a_running_command(site: Site) -> None:
    mark = site.folder / "waits"
    site.worker("w1", "--allow", "shell.run")
    task_id = site.task(agent(site, "wait", "shell.run"))
    until(lambda: mark.exists() and mark.read_text())
    site.call("POST", f"/tasks/{task_id}/cancel", {})
    assert site.until(task_id, "cancelled", seconds=60)["status"] == "cancelled"
    assert not Path(f"/proc/{mark.read_text().strip()}").exists()


def test_a_question_to_a_person_is_answered_in_the_next_claim(site: Site) -> None:
    worker = site.worker()
    task_id = site.task(agent(site, "ask", "human.ask"))
    waiting = site.until(task_id, "waiting")
    assert waiting["waiting_for"]["prompt"] == "Which colour?"
    site.call("POST", f"/tasks/{task_id}/input", {"input": {"colour": "blue"}})
    task = site.ended(task_id)
    assert (task["result"], task["attempt"]) == ({"text": "so blue"}, 1)
    assert [(each["tool"], each["status"]) for each in recorded(site, task_id)] == [("human.ask", "succeeded")]
    assert worker.stop() == 0


def test_a_worker_that_stops_ends_commands_and_gives_the_task_back(site: Site) -> None:
    mark = site.folder / "notes"
    worker = site.worker("w1", "--allow", "shell.run", "--drain-seconds", "1")
    task_id = site.task(agent(site, "note", "shell.run"))
    until(lambda: mark.exists() and mark.read_text())
    assert worker.stop() == 0
    assert site.call("GET", f"/tasks/{task_id}")["status"] == "pending"
    until(lambda: not Path(f"/proc/{mark.read_text().strip()}").exists(), 5)
    site.worker("w2", "--allow", "shell.run")
    assert site.ended(task_id)["result"] == {"text": "end"}
    assert len(mark.read_text().split()) == 1


def test_a_missing_mcp_library_is_told_with_both_ways_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "entry_points", lambda group: ())
    with pytest.raises(
        mcp.McpConfigurationError, match=r"install corral-mcp; from a clone of Corral: pip install \./contrib"
    ):
        mcp.find_connector()
