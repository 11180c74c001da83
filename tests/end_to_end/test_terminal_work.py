"""What people read in a terminal about workflows, triggers, webhooks, files, dead letters and templates.

Names stand where people look for them, and whatever does not work is told with the command that helps.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.end_to_end.terminal import Terminal, signed_in, until

from corral import clock
from corral.testing.server import EMAIL, PASSWORD

pytestmark = [pytest.mark.sqlite, pytest.mark.one_engine]

SCRIPTS = """
[plugins.llm.scripts.refuses]
turns = [{ error = { status = 400, message = "No such thing." } }]
[plugins.llm.scripts.reads]
turns = [{ tool_calls = [{ name = "http__fetch", arguments = { url = "http://127.0.0.1:1/" } }] }, { text = "Done." }]
"""
BREAKER = "webhook:receiver.invalid"


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with signed_in(tmp_path_factory.mktemp("work"), SCRIPTS) as made:
        once = ("-f", 'retry_policy:={"max_attempts": 1}')
        made("agents", "create", "Echo", "--model", "scripted/echo", "--start")
        for name in ("Refuser", "Miser"):  # three failures in a row stop an agent
            made("agents", "create", name, "--model", "scripted/refuses", *once, "--start")
        yield made


def workflow(terminal: Terminal, name: str) -> str:
    """A workflow of one step that gives its input back. Returns the id."""
    step = {"name": "read", "step_type": "transform", "config": {"value": "{{ input.n }}"}}
    return str(terminal.json("workflows", "create", name, "-f", f"steps:={json.dumps([step])}")["id"])


def test_status_tells_only_what_needs_people(terminal: Terminal) -> None:
    """A host key that changed, and a channel that fails, are written as their plugins write them."""
    quiet = terminal("status")
    for line in ("dead letters:", "failed runs:", "disabled triggers:", "ssh connections:", "webhooks:", "channels:"):
        assert line not in quiet
    for line in ("code reviews:", "messages:", "failed triggers:"):
        assert line not in quiet
    assert "agents:" not in quiet
    made = terminal.run("ssh", "create", "builder", "deploy@10.1.2.3", "--password", stdin="only for this\n")
    assert (made.returncode, made.stderr) == (0, ""), made
    nothing = terminal.run("ssh", "create", "other", "deploy@10.1.2.3", "--password")
    assert (nothing.returncode, "standard input contains no password" in nothing.stderr) == (2, True)
    terminal("notifications", "create-channel", "on call", "--type", "webhook", "-f", "url=http://receiver.invalid/x")
    tested = terminal.run("notifications", "test-channel", "on call")
    assert (tested.returncode, tested.stdout) == (1, "Not delivered: connect: receiver.invalid does not resolve\n"), (
        tested
    )
    (terminal.folder / "change.patch").write_text("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+two\n")
    terminal("reviews", "open", "Greet", "change.patch", "--agent", "Echo", "--reviewer", EMAIL)
    assert re.search(r"^Greet +pending +Echo ", terminal("reviews", "list"), re.M)
    assert f"user {EMAIL}: pending" in terminal("reviews", "show", "Greet")
    with sqlite3.connect(terminal.folder / "data" / "corral.db", timeout=60) as database:
        database.execute("UPDATE ssh_connections SET host_key_state = 'mismatch'")
        database.execute("UPDATE notifications_channels SET failing_since = ?, last_error = 'dns'", (clock.now(),))
    told = terminal("status")
    assert re.search(r"^ssh connections: +builder: the host key has changed\. .*corral ssh show builder$", told, re.M)
    assert re.search(r"^channels: +on call fails: dns\. .*deliveries --channel 'on call'$", told, re.M)
    assert re.search(r"^code reviews: +1 waits for a decision: Greet\n +Read one: corral reviews diff", told, re.M)
    assert terminal.json("status")["ssh_connections"]["total"] == 1
    terminal("reviews", "comment", "Greet", "Why two?")
    asked = terminal.json("reviews", "comment", "Greet", "Because.", "--reply-to", "why two")
    assert asked["parent_id"] is not None
    assert terminal("reviews", "resolve", "Greet", "Why two?") == "The thread is resolved.\n"
    unknown = terminal.run("reviews", "resolve", "Greet", "Nobody wrote this")
    assert (unknown.returncode, "no comment begins with Nobody wrote this" in unknown.stderr) == (1, True)
    terminal("reviews", "cancel", "Greet")
    terminal("notifications", "delete-channel", "on call")
    terminal("ssh", "delete", "builder")


def test_dead_letters_are_named_by_the_titles_of_their_tasks(terminal: Terminal) -> None:
    terminal.run("run", "--agent", "Refuser", "Fail for good")
    task_id = terminal.json("tasks", "show", "Fail for good")["id"]
    first = terminal.json("dead-letter", "show", "fail for good")
    assert terminal.json("dead-letter", "show", task_id)["id"] == first["id"]
    assert re.search(r"^agent: +Refuser$", terminal("dead-letter", "show", "Fail for good"), re.M)
    assert "dead letters:  1 task has failed for good. Look at them: corral dead-letter list" in re.sub(
        r" {2,}", "  ", terminal("status")
    )
    told = until(lambda: re.search(r"^notifications: +(.*)$", terminal("status"), re.M))
    assert re.fullmatch(r"\d+ unread \(.*\d error.*\)\. Read them: corral notifications list --unread", told[1])
    about = terminal("notifications", "show", "Task failed: Fail for good")
    assert re.search(rf"^about: +task Fail for good \({task_id}\)$", about, re.M)
    assert f"corral tasks show {task_id}" in about
    assert terminal("notifications", "read", "task failed: fail for good") == "Read: Task failed: Fail for good\n"
    assert "The task Fail for good (" in terminal("dead-letter", "retry", "Fail for good")
    until(lambda: terminal.json("dead-letter", "list")["items"])
    second = terminal.json("dead-letter", "show", "Fail for good")
    assert second["id"] != first["id"]
    assert terminal("dead-letter", "discard", "Fail for good") == "Discarded Fail for good.\n"
    assert "dead letters:" not in terminal("status")


def test_a_task_whose_cost_limit_was_too_small_says_what_helps(terminal: Terminal) -> None:
    """A retry keeps the limit, and only admins change it with a retry. Scripted models cost nothing, so the kind of the
    error is written as the task's outcome writes it.
    """
    limit = ("-f", "max_cost_usd:=0.01")
    made = terminal.json("tasks", "create", "--agent", "Miser", "Cost too much", *limit)
    until(lambda: terminal.json("tasks", "show", made["id"])["status"] == "failed")
    with sqlite3.connect(terminal.folder / "data" / "corral.db", timeout=60) as database:
        change = "UPDATE tasks_tasks SET extra = json_set(extra, '$.error.kind', 'budget') WHERE id = ?"
        assert database.execute(change, (made["id"],)).rowcount == 1
    letter = terminal.json("dead-letter", "show", "Cost too much")["id"]
    remedy = f"corral dead-letter retry {letter} -f max_cost_usd:=USD"
    for told in (terminal("tasks", "explain", "Cost too much"), terminal("tasks", "show", "Cost too much")):
        assert "The task has cost $0.00, and its cost limit of $0.01 did not allow another model call." in told
        assert remedy in told
    refused = terminal.run("tasks", "retry", "Cost too much")
    assert (refused.returncode, "a retry keeps the limit" in refused.stderr, remedy in refused.stderr) == (
        1,
        True,
        True,
    )
    raised = ("-f", "max_cost_usd:=0.5")
    assert terminal.json("dead-letter", "retry", "Cost too much", *raised)["task"]["max_cost_usd"] == 0.5
    until(lambda: terminal.json("dead-letter", "list")["items"])
    assert "is pending" in terminal("tasks", "retry", "Cost too much")
    until(lambda: terminal.json("dead-letter", "list")["items"])
    terminal("dead-letter", "discard", "Cost too much")
    told = until(lambda: re.search(r"^agents: +Miser: (.*)$", terminal("status"), re.M))
    assert told[1].endswith("corral agents start Miser")
    created = terminal.run("tasks", "create", "--agent", "Miser", "Wait for me")
    assert "warning: The agent is in the state error: " in created.stderr
    assert "corral agents start Miser" in created.stderr
    assert "The agent is in the state error: its tasks failed in a row" in terminal("tasks", "explain", "Wait for me")
    assert "\nHeld up\nWait for me: The agent is in the state error: its tasks failed" in terminal("status")
    assert re.search(r"^queue: +1 task$", terminal("status"), re.M)
    scheduled = ("-f", f"available_at={clock.now(86_400.0)}")
    terminal.run("tasks", "create", "--agent", "Miser", "Tomorrow", *scheduled)
    assert re.search(r"^queue: +2 tasks, 1 scheduled for later$", terminal("status"), re.M)
    for number in range(5):
        terminal.run("tasks", "create", "--agent", "Miser", f"Later {number}")
    (held,) = terminal.json("status")["held_up"]  # the oldest five of six that are due
    assert held["tasks"] == ["Wait for me", "Later 0", "Later 1", "Later 2", "Later 3"]


def test_runs_are_named_by_their_workflow(terminal: Terminal) -> None:
    workflow(terminal, "Give back")
    terminal.run("workflows", "run", "Give back", "--wait")
    assert terminal.json("workflows", "run", "Give back", "-i", "n=3", "--wait")["output"] == {"read": "3"}
    for line in terminal("workflows", "runs").splitlines()[1:]:
        assert re.match(rf"Give back +\d +\w+ +{re.escape(EMAIL)} ", line)
    assert terminal.json("workflows", "show-run", "give back")["number"] == 2
    failed = terminal("workflows", "show-run", "Give back/1")
    assert re.search(r"^status: +failed$", failed, re.M)
    assert re.search(r"^failed runs: +1 within the last 24 hours\. .*runs --status failed$", terminal("status"), re.M)
    missing = terminal.run("workflows", "cancel", "Give back/9")
    assert "there is no run 9 of the workflow Give back" in missing.stderr
    assert "corral workflows runs 'Give back'" in missing.stderr
    for option in ("-f", "--field"):  # as other commands name their fields
        assert terminal.json("workflows", "run", "Give back", option, "n=4", "--wait")["output"] == {"read": "4"}


def test_a_retry_after_an_edit_says_which_definition_it_uses(terminal: Terminal) -> None:
    workflow(terminal, "Repair")
    terminal.run("workflows", "run", "Repair", "--wait")
    assert "--current" not in terminal("workflows", "retry", "Repair/1")
    step = {"name": "read", "step_type": "transform", "config": {"value": "repaired"}}
    terminal("workflows", "edit", "Repair", "-f", f"steps:={json.dumps([step])}")
    told = terminal("workflows", "retry", "Repair/1")
    assert "It uses version 1 of the definition" in told
    command = told.rpartition("Repeat the run with the changes: corral ")[2].split()
    assert command == ["workflows", "retry", "Repair/1", "--from", "failed", "--current"]
    assert "--current" not in terminal(*command)
    assert terminal.run("workflows", "watch", "Repair").stdout.strip() == '{\n  "read": "repaired"\n}'


def test_a_step_whose_agent_may_not_use_its_tool_says_so_everywhere(terminal: Terminal) -> None:
    """When it is saved, validated, looked at and watched: the condition that `corral tasks explain` tells."""
    agent = terminal.json("agents", "show", "Echo")["id"]
    call = {"tool": "http.fetch", "arguments": {"url": "https://example.org"}}
    steps = [{"name": "look", "step_type": "tool", "agent_id": agent, "config": call}]
    made = terminal.run("workflows", "create", "Look it up", "-f", f"steps:={json.dumps(steps)}")
    remedy = "corral agents edit Echo --tool http.fetch"
    warning = f"Warning: /steps/0/config/tool: The agent Echo may not use the tool http.fetch, .*{remedy}"
    assert re.search(warning, made.stderr), made
    assert re.search(warning, terminal.run("workflows", "validate", "Look it up").stderr)
    assert re.search(warning, terminal.run("workflows", "edit", "Look it up", "-f", "description=x").stderr)
    run = terminal.json("workflows", "run", "Look it up")["id"]
    why = f"look waits: The agent may not use http.fetch. Enable the tools: {remedy}"
    until(lambda: why in terminal("workflows", "show-run", run))
    command = [sys.executable, "-m", "corral", "workflows", "watch", run]
    with subprocess.Popen(command, cwd=terminal.folder, env=terminal.environ, stderr=subprocess.PIPE) as watcher:
        assert watcher.stderr is not None
        assert any(line.decode().strip() == why for line in iter(watcher.stderr.readline, b""))
        terminal("workflows", "cancel", run)
        assert watcher.wait(60) == 1


def test_a_workflow_that_triggers_run_is_deleted_only_with_yes(terminal: Terminal) -> None:
    """Its trigger fails then. Corral disables it, and says how to see why and how to enable it again."""
    workflow(terminal, "Report")
    terminal("triggers", "create", "Daily report", "--cron", "@daily", "--workflow", "Report", "-i", "n=1")
    assert "run_workflow Report" in terminal("triggers", "list")
    terminal("triggers", "fire", "Daily report")
    until(lambda: "Report run 1 (" in terminal("triggers", "history", "Daily report"))
    assert "trigger Daily report" in terminal("workflows", "runs", "Report")
    refused = terminal.run("workflows", "delete", "Report")
    assert (refused.returncode, "would fail without it: Daily report; " in refused.stderr) == (1, True), refused
    assert "--yes" in refused.stderr
    assert terminal("workflows", "delete", "Report", "--yes").startswith("Deleted Report (")
    terminal("triggers", "fire", "Daily report")
    told = until(lambda: re.search(r"^failed triggers: +(.*)$", terminal("status"), re.M))
    assert told[1] == "Daily report. See why: corral triggers history 'Daily report' --status failed"
    terminal("api", "PUT", "/settings/triggers/max_failures", "-f", "value:=1")
    terminal("triggers", "fire", "Daily report")
    until(lambda: not terminal.json("triggers", "show", "Daily report")["enabled"])
    assert "no, disabled after failures in a row" in terminal("triggers", "list")
    shown = terminal("triggers", "show", "Daily report")
    assert "corral triggers history 'Daily report' --status failed" in shown
    assert "Enable it: corral triggers toggle 'Daily report' --on" in shown
    told = re.search(r"^disabled triggers: +(.*)$", terminal("status"), re.M)
    assert told is not None
    assert told[1] == "Daily report (max_failures). See why, and what to do: corral triggers show 'Daily report'"
    workflow(terminal, "Report")
    terminal("triggers", "edit", "Daily report", "--workflow", "Report")
    assert terminal.json("triggers", "toggle", "Daily report", "--on")["enabled"] is True
    status = terminal("status")
    assert "disabled triggers:" not in status
    assert "failed triggers:" not in status
    terminal("triggers", "delete", "Daily report")


def test_the_header_of_a_signature_is_named(terminal: Terminal) -> None:
    def made(**config: str) -> tuple[str, str]:
        create = ("triggers", "create", "Signed", "--webhook", "--task", "Handle it")
        created = terminal(*create, "-f", f"config:={json.dumps(config)}")
        shown = terminal("triggers", "show", "Signed")
        rotated = terminal("triggers", "rotate-secret", "Signed")
        assert [line for line in rotated.splitlines() if "header" in line] == [
            line for line in created.splitlines() if "header" in line
        ]
        terminal("triggers", "delete", "Signed")
        return created, shown

    value = "the hexadecimal HMAC-SHA256 of the body under the secret"
    created, shown = made(auth="hmac_sha256")
    assert f"Callers sign each call in the header X-Signature-256: {value}." in created
    assert re.search(rf"^signature: +header X-Signature-256: {value}$", shown, re.MULTILINE)
    assert f"header X-Mine: {value}" in made(auth="hmac_sha256", signature_header="X-Mine")[0]
    assert f"header X-Hub-Signature-256: {value}, as GitHub does" in made(auth="github")[0]
    assert "headers webhook-id, webhook-timestamp and webhook-signature" in made(auth="standard")[0]
    created, shown = made()
    assert "Its address" in created
    assert "signature" not in (created + shown).lower()


def test_setting_a_circuit_breaker_without_a_field_says_what_it_did(terminal: Terminal) -> None:
    made = terminal("circuit-breakers", "set", "fresh")
    assert made == "Created fresh with the default configuration. It guards no calls yet.\n"
    assert "Nothing was changed, because fresh exists already; give --field" in terminal(
        "circuit-breakers", "set", "fresh"
    )
    assert terminal("circuit-breakers", "set", "fresh", "-f", "minimum_calls:=5") == "fresh is closed.\n"
    terminal("api", "DELETE", "/circuit-breakers/fresh")


def test_triggers_are_edited(terminal: Terminal) -> None:
    """What is not named stays."""
    workflow(terminal, "Count")
    zone = ("--timezone", "Europe/Berlin")
    terminal("triggers", "create", "Early", "--cron", "0 7 * * *", *zone, "--workflow", "Count", "-i", "n=1")
    told = terminal(
        "triggers", "edit", "Early", "--cron", "30 8 * * *", "-i", "m=2", "--name", "Late", "--filter", "true"
    )
    assert told.startswith("Changed Late.\nIt fires next at ")
    changed = terminal.json("triggers", "show", "Late")
    assert changed["config"] == {"expression": "30 8 * * *", "timezone": "Europe/Berlin"}
    assert (changed["action"]["input"], changed["filter"]) == ({"n": "1", "m": "2"}, "true")
    changed = terminal.json("triggers", "edit", "Late", "--task", "Count them", "--filter", "")
    assert (changed["action"]["type"], changed["filter"]) == ("create_task", None)
    wrong = terminal.run("triggers", "edit", "Late", "--every", "20")
    assert (wrong.returncode, "Late has the type cron" in wrong.stderr) == (2, True), wrong
    assert terminal.run("triggers", "edit", "Late").returncode == 2
    assert terminal.run("triggers", "edit", "Late", "--task", "a", "-i", "n=1").returncode == 2
    terminal("triggers", "delete", "Late")


def test_a_completed_task_shows_its_failed_tool_calls_and_an_agent_its_reviews(terminal: Terminal) -> None:
    """The model may go on after a failed call, so that only the record tells of it."""
    review = ("-f", 'review_policy:={"mode": "human"}')
    terminal("agents", "create", "Reader", "--model", "scripted/reads", "--tool", "http.fetch", "--start")
    terminal("run", "--agent", "Reader", "Read the page")
    shown = terminal("tasks", "show", "Read the page")
    assert re.search(r"^status: +completed$", shown, re.M)
    assert re.search(r"^failed tool calls: +http\.fetch: failed, \S", shown, re.M), shown
    assert "review of results:" not in terminal("agents", "show", "Reader")
    terminal("agents", "edit", "Reader", *review)
    assert re.search(r"^review of results: +by a person$", terminal("agents", "show", "Reader"), re.M)


def test_files_belong_to_tasks_by_their_titles(terminal: Terminal) -> None:
    terminal("run", "--agent", "Echo", "Read the file")
    (terminal.folder / "notes.txt").write_text("Notes.\n")
    terminal("files", "upload", "notes.txt", "--task", "read the file", "--share")
    assert re.search(r"^notes\.txt .* Read the file ", terminal("files", "list", "--task", "Read the file"), re.M)
    shown = terminal("files", "show", "notes.txt")
    assert re.search(r"^task: +Read the file \(", shown, re.M)
    assert re.search(rf"^owner: +{re.escape(EMAIL)}$", shown, re.M)
    nowhere = terminal.run("files", "download", "notes.txt", "--to", "missing/notes.txt")
    assert (nowhere.returncode, "the folder missing does not exist" in nowhere.stderr) == (1, True)
    terminal("files", "delete", "notes.txt")


def test_a_webhook_behind_an_open_breaker_says_so(terminal: Terminal) -> None:
    made = terminal("webhooks", "create", "http://receiver.invalid/hook", "--event", "task.created")
    assert "Warning: the host name does not resolve now; check its spelling" in made
    terminal("circuit-breakers", "force-open", BREAKER, "--reason", "The contract has ended.")
    test = ("webhooks", "test", "receiver.invalid")
    until(lambda: json.loads(terminal.run(*test, "--json").stdout)["error"] == "circuit_open")
    remedy = f"Close it at once: corral circuit-breakers force-close {BREAKER}"
    open_one = f"the circuit breaker {BREAKER} is forced open (The contract has ended). {remedy}"
    refused = terminal.run(*test)
    assert (refused.returncode, refused.stdout) == (1, f"Not sent: {open_one}\n")
    assert open_one in terminal("webhooks", "show", "receiver.invalid")
    terminal("tasks", "create", "--agent", "Echo", "Tell them")
    rows = until(lambda: terminal.json("webhooks", "deliveries", "receiver.invalid")["items"])
    assert rows[0]["id"] in terminal("webhooks", "delivery", "receiver.invalid", "task.created")
    listed = terminal.run("webhooks", "deliveries", "receiver.invalid")
    assert "  waits for the breaker  " in listed.stdout
    assert listed.stderr == f"Open deliveries wait: {open_one}\n"
    delivery = ("receiver.invalid", rows[0]["id"])
    assert open_one in terminal("webhooks", "delivery", *delivery)
    assert open_one.removesuffix(".") in terminal.run("webhooks", "redeliver", *delivery).stderr
    missing = terminal.run("webhooks", "redeliver", "receiver.invalid", "nothing")
    assert missing.stderr.startswith("corral: there is no delivery nothing at ")
    assert "corral webhooks deliveries receiver.invalid" in missing.stderr
    terminal("circuit-breakers", "force-close", BREAKER)
    until(lambda: terminal.json("webhooks", "show", "receiver.invalid")["failing_since"])
    assert re.search(
        r"^webhooks: +receiver\.invalid has failed since .*corral webhooks deliveries receiver\.invalid$",
        terminal("status"),
        re.M,
    )
    assert re.search(rf"^receiver\.invalid +{re.escape(EMAIL)} ", terminal("webhooks", "list", "--all"), re.M)
    assert terminal.run(*test).stderr == ""
    disabled = terminal.json("webhooks", "disable", "receiver.invalid")["id"]
    warning = f"the webhook is disabled and receives no events. Enable it: corral webhooks enable {disabled}"
    assert terminal.run(*test).stderr == f"warning: {warning}\n"
    terminal("webhooks", "delete", "receiver.invalid")


def test_people_are_named_by_their_addresses(terminal: Terminal) -> None:
    with terminal.server.sign_in() as admin:
        fields = {"email": "bea@example.org", "full_name": "Bea", "role": "member", "password": PASSWORD}
        admin.post("/admin/users", json=fields).raise_for_status()
    terminal("messages", "send", "--to-user", "bea@example.org", "Good morning")
    assert re.search(r" user bea@example\.org .*Good morning", terminal("messages", "list"))
    own = terminal.json("messages", "send", "--as-agent", "Echo", "--to-user", EMAIL, "Remember the milk")["id"]
    told = re.search(r"^messages: +(.*)$", terminal("status"), re.M)
    assert told is not None
    assert told[1] == "1 unread, from Echo. Read them: corral messages list --unread"
    assert re.search(r"^from: +Echo$", terminal("messages", "read", "remember the milk"), re.M)
    assert "messages:" not in terminal("status")
    terminal("messages", "send", "--to-agent", "Echo", "--reply-to", "Remember the milk", "I do")
    reply = terminal.json("messages", "list", "--agent", "Echo")["items"][0]
    assert reply["in_reply_to"] == own
    terminal("approvals", "ask", "Buy it", "-f", "allow_self:=true")
    terminal("approvals", "comment", "Buy it", "It is cheap.")
    shown = terminal("approvals", "show", "Buy it")
    assert f"user {EMAIL}: It is cheap." in shown
    assert re.search(r"^approvals: +1 waits for your decision: Buy it \(\w+\)\n +Read one: ", terminal("status"), re.M)
    made = terminal.json("approvals", "approve", "Buy it")
    assert f"approve by {EMAIL} at " in terminal("approvals", "show", made["id"])


def test_a_review_names_its_blockers_and_is_found_after_its_decision(terminal: Terminal) -> None:
    (terminal.folder / "blocked.patch").write_text("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+two\n")
    terminal("reviews", "open", "Count on", "blocked.patch", "--agent", "Echo")
    terminal("reviews", "comment", "Count on", "This loses data.", "--at", "x.py:1", "--severity", "blocker")
    refused = terminal.run("reviews", "approve", "Count on")
    assert refused.returncode == 1
    assert f"\nblocker by user {EMAIL} x.py:1: This loses data.\n(" in refused.stderr
    assert "\nResolve one: corral reviews resolve " in refused.stderr
    terminal("reviews", "request-changes", "Count on")
    early = terminal.run("reviews", "approve", "Count on")
    assert (
        early.returncode,
        "changes to Count on were requested; wait for the agent's next revision" in early.stderr,
    ) == (
        1,
        True,
    )
    (terminal.folder / "blocked.patch").write_text("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+three\n")
    assert "is pending at revision 2." in terminal("reviews", "revise", "Count on", "blocked.patch")
    wrong = terminal.run("reviews", "approve", "Count on", "--sha256", "x")
    assert (wrong.returncode, "--sha256 x is not a SHA-256 hash of 64 hexadecimal digits" in wrong.stderr) == (
        2,
        True,
    )
    terminal("reviews", "resolve", "Count on", "This loses")
    terminal("reviews", "approve", "Count on")
    assert re.search(r"^status: +approved$", terminal("reviews", "show", "count on"), re.M)
    again = terminal.run("reviews", "approve", "Count on")
    assert (again.returncode, ") is approved; `corral reviews show " in again.stderr) == (1, True), again


def test_an_override_that_lifts_nothing_says_so(terminal: Terminal) -> None:
    told = terminal.run("agents", "start", "Echo", "--override")
    assert told.returncode == 0, told
    assert "--override had no effect: Echo was not paused by its budget." in told.stderr
    assert "--override had no effect" not in terminal.run("agents", "start", "Echo").stderr


def test_templates_say_what_to_give_and_what_to_do_next(terminal: Terminal) -> None:
    shown = terminal("template", "show", "research-assistant")
    assert "depth: integer, at least 1, at most 8, default 4 (Greatest number of parts of a question)" in shown
    assert re.search(r"language: string, characters at most 60, default English", shown)
    wrong = terminal.run("template", "plan", "research-assistant", "-p", "depth=3")
    assert wrong.stderr.splitlines() == [
        "corral: /parameters/depth: must be an integer",
        "  depth was given as text; write -p depth:=VALUE for a number, true, false or a list",
    ]
    planned = terminal.run("template", "plan", "hello-fleet")
    assert "agent Greeter: it needs a model: without a model, scripted/echo only repeats its input." in planned.stderr
    installed = terminal("template", "install", "hello-fleet")
    assert "Start the agent: corral agents start Greeter" in installed
    assert "Run the workflow, which is a draft: corral workflows run 'Hello fleet'\n" in installed
    terminal("agents", "start", "Greeter")
    terminal("agents", "edit", "Greeter", "-f", "system_prompt=Mine.")
    conflicts = terminal("template", "upgrade", "hello-fleet", "-p", "language=French", "--dry-run")
    assert "would keep agent Greeter: system_prompt\n" in conflicts
    assert re.search(r'installed: .*English.*\n +new: .*French.*\n +current, kept: "Mine."\n', conflicts), conflicts
    assert "there is no template nobody-has-it at " in terminal.run("template", "install", "nobody-has-it").stderr
    removal = terminal("template", "uninstall", "hello-fleet", "--dry-run")
    assert "would remove workflow Hello fleet\nwould keep agent Greeter: running." in removal
    told = terminal("template", "uninstall", "hello-fleet")
    assert "removed workflow Hello fleet\n" in told
    assert "kept agent Greeter: running. Stop it: corral agents stop Greeter\n" in told
    assert told.endswith("Then remove the rest: corral template uninstall hello-fleet\n")
    terminal("agents", "stop", "Greeter")
    assert terminal("template", "uninstall", "hello-fleet", "--force") == "removed agent Greeter\n"
    assert " -i transcript=TRANSCRIPT\n" in terminal("template", "install", "meeting-minutes")
    reviewing = terminal.run("template", "install", "pr-reviewer")
    assert "missing: the secret" not in reviewing.stderr
    *_, run, activate, enable = reviewing.stdout.splitlines()
    assert run == "Run the workflow, which is a draft: corral workflows run 'Review a pull request'"
    assert activate.startswith("Make the workflow active, so that the trigger Pull request opened may run it: corral ")
    assert enable == "Enable the trigger: corral triggers toggle --on 'Pull request opened'"
    private = terminal.run("template", "plan", "pr-reviewer", "-p", "private:=true")
    assert "missing: the secret GIT_TOKEN; an admin must create it: corral api POST /secrets" in private.stderr


def test_commands_of_members_ask_only_for_what_members_may_read(terminal: Terminal) -> None:
    """A refused request for what only admins may read would be a denial in the audit log."""
    with terminal.server.sign_in() as admin:
        fields = {"email": "max@example.org", "full_name": "Max", "role": "member", "password": PASSWORD}
        made = admin.post("/admin/users", json=fields).raise_for_status().json()
        own = admin.get("/auth/me").raise_for_status().json()["id"]
        environ = {"XDG_CONFIG_HOME": str(terminal.folder / "max")}
        terminal("login", terminal.address, "--email", "max@example.org", "--password-file", "password", **environ)
        assert "max@example.org (member)" in terminal("status", **environ)
        terminal("messages", "send", "--to-user", own, "Good morning", **environ)
        assert f" user {own} " in terminal("messages", "list", **environ)
        denied = admin.get("/admin/audit", params={"actor": made["id"], "outcome": "denied"}).raise_for_status()
    assert denied.json()["items"] == []
