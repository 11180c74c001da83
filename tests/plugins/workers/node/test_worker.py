"""`corral worker` against a real server, both as processes. For its tools see `test_tools.py`."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Site = Any  # of conftest.py

TOOL = {"tool_calls": [{"name": "nothing__here", "arguments": {}}]}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
# Short leases, so that a killed worker's task comes back soon.
SOON = '"tasks.lease_seconds" = 10\n"tasks.ack_seconds" = 5\n"tasks.cancel_grace_seconds" = 10'


LONG_TEXT = " ".join(f"word{n}" for n in range(500))


def step(seconds: float) -> dict[str, Any]:
    return {**TOOL, "delay_seconds": seconds}


def scripts(folder: Path) -> dict[str, Any]:
    """The scripts of the server that tests of this module share."""
    return {
        "slow": [step(60)],
        "steps": [step(0.1), step(2), step(0.1), {"text": "end"}],
        "talk": [{"text": LONG_TEXT, "chunk": 10, "delay_seconds": 60}],
        "json": [{"text": "no json"}, {"text": '{"n": "x"}'}, {"text": '{"n": 7}'}],
        "nap": [{"text": "slept", "delay_seconds": 1}],
    }


def test_a_task_is_completed_by_a_worker(site: Site) -> None:
    worker = site.worker()
    task = site.ended(site.task(site.agent("echo"), instructions="Say hello."))
    assert (task["status"], task["result"], task["attempt"]) == ("completed", {"text": "Say hello."}, 1)
    (call,) = site.calls(task["id"])
    assert (call["status"], call["model"]) == ("completed", "echo")
    assert site.call("GET", f"/tasks/{task['id']}/logs")["items"]
    worker.wait_for(r"attempt 1 completed after \d+\.\d s")
    assert worker.stop() == 0


def test_workers_6_the_identity_is_kept_and_private(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    first = site.worker("w1", "--dir", str(folder))
    (known,) = site.call("GET", "/admin/workers")["items"]
    for path in (folder / "identity.json", folder / "fingerprint"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = site.start("worker", "--url", site.url, "--name", "w1", "--dir", str(folder))
    assert second.popen.wait(60) == 3
    assert "another --name or --dir" in second.output
    assert first.stop() == 0
    again = site.start("worker", "--url", site.url, "--name", "w1", "--dir", str(folder))
    again.wait_for(known["id"])
    assert [item["id"] for item in site.call("GET", "/admin/workers")["items"]] == [known["id"]]
    task = site.ended(site.task(site.agent("echo")))
    assert task["status"] == "completed"


def test_of_two_workers_with_one_fingerprint_one_is_told_and_ends(site: Site, tmp_path: Path) -> None:
    key, folders = site.key(), [tmp_path / "identity", tmp_path / "copy"]
    folders[1].mkdir(mode=0o700)
    both = [site.worker("w1", "--dir", str(folders[0]), key=key)]
    shutil.copy(folders[0] / "fingerprint", folders[1])
    both.append(site.worker("w1", "--dir", str(folders[1]), key=key))
    stop = time.monotonic() + 120
    while all(each.popen.poll() is None for each in both):
        assert time.monotonic() < stop, [each.output for each in both]
        time.sleep(0.1)
    (over,) = [each for each in both if each.popen.poll() is not None]
    (left,) = [each for each in both if each is not over]
    assert over.popen.returncode == 1
    assert "Another worker with the same name and fingerprint is registering" in over.output
    assert len(site.call("GET", "/admin/workers")["items"]) == 1
    assert site.ended(site.task(site.agent("echo")))["status"] == "completed"
    assert left.stop() == 0


def test_an_unapproved_worker_waits_and_then_works(site: Site) -> None:
    worker = site.worker(key=site.key(auto_approve=False))
    worker.wait_for("waiting for an admin to approve this worker: corral workers approve ")
    task_id = site.task(site.agent("echo"))
    (item,) = site.call("GET", "/admin/workers")["items"]
    assert item["status"] == "pending"
    site.call("PATCH", f"/admin/workers/{item['id']}/approve", {"is_approved": True})
    assert site.ended(task_id)["status"] == "completed"


def test_a_worker_without_a_key_says_what_to_do(site: Site) -> None:
    process = site.start("worker", "--url", site.url, "--name", "nobody")
    assert process.popen.wait(60) == 1
    assert "CORRAL_WORKER_TOKEN" in process.output


def test_a_wrong_registration_key_is_named_at_once(site: Site) -> None:
    process = site.start("worker", "--url", site.url, "--name", "nobody", CORRAL_WORKER_TOKEN="crg_wrong")
    assert process.popen.wait(60) == 1
    assert "The server does not accept the registration key: it is wrong, expired or used up." in process.output
    assert "corral api POST /admin/registration-keys" in process.output


@pytest.mark.parametrize("moment", ["imports", "fork server"])
def test_ctrl_c_at_the_start_prints_no_traceback(moment: str, tmp_path: Path) -> None:
    """The terminal sends it to the whole group: also to the fork server, which loads its modules for a second."""
    command = [sys.executable, "-m", "corral", "worker", "--url", "http://127.0.0.1:9", "--dir", str(tmp_path / "dir")]
    environ = {**os.environ, "CORRAL_WORKER_TOKEN": "crg_x"}
    if moment == "imports":
        environ["PYTHONPROFILEIMPORTTIME"] = "1"  # tells what is imported, one line each
    process = subprocess.Popen(
        command,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the shell ignores it
    )
    assert process.stderr is not None
    awaited = "waiting for the server" if moment == "fork server" else "corral.config"
    begins = next(line for line in process.stderr if awaited in line)
    os.killpg(process.pid, signal.SIGINT)
    told = begins + process.stderr.read()  # until the last process of the group has ended
    assert process.wait(60) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in told


def test_what_is_wrong_with_the_call_of_a_worker_is_one_line(run_corral: Callable[..., Any], tmp_path: Path) -> None:
    for name, data in (("image", b"\x89PNG\xff"), ("word", "schl\u00fcssel".encode()), ("key", b"crg_x")):
        (tmp_path / name).write_bytes(data)
    files = ("image", "word", "key", "taken")
    (tmp_path / "taken" / ".fingerprint.new").mkdir(parents=True)
    cases = [
        (("--token-file", "image"), 2, "image: a registration key must consist"),
        (("--token-file", "word"), 2, "word: a registration key must consist"),
        (("--token-file", "key", "--dir", "key/of"), 1, "cannot be used"),
        (("--token-file", "key", "--url", "http://[::1"), 2, "http://[::1 is not a valid URL"),
        (("--token-file", "key", "--url", "http://127.0.0.1:x"), 2, "http://127.0.0.1:x is not a valid URL"),
        (("--token-file", "key", "--label", "a=\udcff"), 2, "must be UTF-8 text"),
        (("--token-file", "key", "--dir", "taken"), 1, "Choose another --dir"),
    ]
    for arguments, status, words in cases:
        told = [str(tmp_path / each) if each.startswith(files) else each for each in arguments]
        process = run_corral("worker", "--name", "w", "--url", "http://127.0.0.1:9", *told)
        assert process.popen.wait(60) == status, process.output
        assert words in process.output
        assert "Traceback" not in process.output


def test_workers_8_another_worker_goes_on_from_the_last_checkpoint(make_site: Callable[..., Site], gone: Any) -> None:
    site = make_site({"ten": [*[step(0.1)] * 6, step(4), *[step(0.1)] * 2, {"text": "end"}]}, settings=SOON)
    first = site.worker("w1")
    task_id = site.task(site.agent("ten"))
    wait_for_calls(site, task_id, 7)  # steps 1 to 6 are kept, the seventh runs
    family = first.tree()
    os.kill(first.popen.pid, signal.SIGKILL)
    assert gone(family)
    before = len(site.calls(task_id))
    site.worker("w2")
    task = site.ended(task_id)
    assert (task["status"], task["result"]) == ("completed", {"text": "end"})
    assert 3 <= len(site.calls(task_id)) - before <= 4
    assert before == 7


def wait_for_calls(site: Site, task_id: str, count: int) -> None:
    until = time.monotonic() + 60
    while len(site.calls(task_id)) < count:
        assert time.monotonic() < until, site.server.output
        time.sleep(0.05)


def test_cancel_ends_a_running_task_at_once(site: Site) -> None:
    worker = site.worker()
    task_id = site.task(site.agent("slow"))
    wait_for_calls(site, task_id, 1)
    began = time.monotonic()
    site.call("POST", f"/tasks/{task_id}/cancel", {})
    task = site.until(task_id, "cancelled", seconds=60)
    assert time.monotonic() - began < 50  # the answer takes a minute
    assert task["status"] == "cancelled"
    assert site.ended(site.task(site.agent("echo")))["status"] == "completed"
    assert worker.stop() == 0


def test_a_long_answer_is_seen_as_it_comes_and_cancelled_in_the_middle(site: Site) -> None:
    worker = site.worker()
    task_id = site.task(site.agent("talk"))
    seen: set[str] = set()
    until = time.monotonic() + 60
    while len(seen) < 3:
        assert time.monotonic() < until, worker.output
        if progress := site.call("GET", f"/tasks/{task_id}")["progress"]:
            seen.add(progress["message"])
        time.sleep(0.1)
    assert all(message in LONG_TEXT for message in seen)
    began = time.monotonic()
    site.call("POST", f"/tasks/{task_id}/cancel", {})
    site.until(task_id, "cancelled", seconds=60)
    assert time.monotonic() - began < 50  # the answer takes a minute
    (call,) = site.calls(task_id)
    assert call["status"] != "completed"
    assert worker.stop() == 0


def test_an_answer_that_breaks_the_schema_is_repaired(site: Site) -> None:
    site.worker()
    task = site.ended(site.task(site.agent("json"), output_schema=SCHEMA))
    assert (task["status"], task["result"]) == ("completed", {"n": 7})
    assert len(site.calls(task["id"])) == 3


def test_a_crash_of_the_process_is_a_retryable_failure(make_site: Callable[..., Site]) -> None:
    settings = f'{SOON}\n"tasks.backoff_initial_seconds" = 0'
    site = make_site({"slow": [step(0.1), step(3), {"text": "end"}]}, settings=settings)
    worker = site.worker()
    task_id = site.task(site.agent("slow"))
    wait_for_calls(site, task_id, 2)
    victim = next(process for process in worker.tree() if os.getpgid(process.pid) != worker.popen.pid)
    victim.kill()
    task = site.ended(task_id)
    assert (task["status"], task["attempt"]) == ("completed", 2)
    attempts = site.call("GET", f"/tasks/{task_id}/attempts")["items"]
    assert attempts[0]["error"]["type"] == "worker_crash"
    assert "SIGKILL" in attempts[0]["error"]["message"]


def test_a_task_fails_soon_with_the_reason_while_the_gateway_has_failed(make_site: Callable[..., Site]) -> None:
    """Each attempt took 120 s, because the worker waited as long as the server's `Retry-After` said."""
    site = make_site({}, config="[plugins.llm]\nunknown = true")
    site.worker()
    task = site.ended(site.task(site.agent("echo"), retry_policy={"max_attempts": 2, "initial_seconds": 0}), seconds=90)
    assert (task["status"], task["attempt"], task["error"]["type"]) == ("failed", 2, "plugin_failed")
    assert task["error"]["message"].startswith("The plugin llm is failed: ")
    assert task["error"]["message"].endswith("Ask an admin to look at it: corral plugins show llm")


def test_a_gateway_that_comes_back_soon_costs_no_attempt(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.worker()
    agent = site.agent("echo")
    site.call("POST", "/plugins/llm/disable", {})
    task_id = site.task(agent)
    site.server.wait_for("method=POST .*status=503")  # the model call was refused; the next one is 3 s or more away
    site.call("POST", "/plugins/llm/enable", {})
    task = site.ended(task_id)
    assert (task["status"], task["attempt"]) == ("completed", 1)
    (attempt,) = site.call("GET", f"/tasks/{task_id}/attempts")["items"]
    assert attempt["status"] == "completed"


def test_sigterm_gives_the_task_back_with_its_checkpoint(site: Site) -> None:
    worker = site.worker("w1")
    task_id = site.task(site.agent("steps"))
    wait_for_calls(site, task_id, 2)
    assert worker.stop() == 0
    task = site.call("GET", f"/tasks/{task_id}")
    assert (task["status"], task["attempt"]) == ("pending", 0)
    site.worker("w2")
    assert site.ended(task_id)["result"] == {"text": "end"}
    assert len(site.calls(task_id)) == 4


def test_a_second_signal_ends_at_once_and_leaves_nothing(site: Site, gone: Any) -> None:
    worker = site.worker()
    wait_for_calls(site, site.task(site.agent("slow")), 1)
    family = worker.tree()
    worker.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert worker.popen.poll() is None
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(60) == 130
    assert gone(family)


def test_many_tasks_run_side_by_side(site: Site) -> None:
    site.worker("w1", "--max-agents", "4")
    agent = site.agent("nap", max_concurrent_tasks=4)
    tasks = [site.ended(task_id) for task_id in [site.task(agent) for _ in range(8)]]
    assert [task["status"] for task in tasks] == ["completed"] * 8
    beside = [sum(each["started_at"] <= task["started_at"] < each["finished_at"] for each in tasks) for task in tasks]
    assert max(beside) == 4


def test_the_embedded_worker_dies_with_its_server(make_site: Callable[..., Site], gone: Any) -> None:
    site = make_site({"slow": [step(60)]}, "--no-jobs")
    assert site.ended(site.task(site.agent("echo")))["status"] == "completed"
    wait_for_calls(site, site.task(site.agent("slow")), 1)
    family = site.server.tree()
    assert len(family) >= 3
    os.kill(site.server.popen.pid, signal.SIGKILL)
    assert gone(family)


def test_the_embedded_worker_stops_with_its_server(make_site: Callable[..., Site], gone: Any) -> None:
    site = make_site({"slow": [step(2), {"text": "end"}]}, "--no-jobs")
    task_id = site.task(site.agent("slow"))
    wait_for_calls(site, task_id, 1)
    family = site.server.tree()
    assert site.server.stop(30) == 0
    assert gone(family)
