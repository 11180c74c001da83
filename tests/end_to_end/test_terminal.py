"""The commands that use a running server, in the order in which a person would type them.

Done when, of the page on operations: 8 for the commands of the client.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pyotp
import pytest
from click.testing import CliRunner
from tests.end_to_end.terminal import Terminal, signed_in, until
from tests.kernel.cli.warm import warm

from corral.cli.api_client import ApiClient
from corral.cli.output import format_ms
from corral.cli.saved_sessions import SavedSession, SavedSessions
from corral.cli.server_connection import client_command
from corral.clock import parse_instant
from corral.testing.server import EMAIL, PASSWORD

SCRIPTS = """
[plugins.llm.scripts.asks]
turns = [
    { tool_calls = [{ name = "human__ask", arguments = { prompt = "Which colour?" } }] },
    { match = "blue", text = "so blue" },
]
[plugins.llm.scripts.refuses]
turns = [{ error = { status = 400, message = "No such thing." } }]
"""
HEAVY = ("peewee", "quart", "jsonschema", "cryptography", "pydantic_ai", "structlog", "hypercorn", "corral.kernel")


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with signed_in(tmp_path_factory.mktemp("terminal"), SCRIPTS) as made:
        for name, model in (("Echo", "echo"), ("Asker", "asks"), ("Refuser", "refuses")):
            once = ("-f", 'retry_policy:={"max_attempts": 1}')
            made("agents", "create", name, "--model", f"scripted/{model}", "--tool", "human.ask", *once, "--start")
        yield made


def test_the_session_is_kept_for_this_user_only(terminal: Terminal) -> None:
    folder = terminal.folder / "config" / "corral"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "sessions.json").stat().st_mode) == 0o600
    assert PASSWORD not in (folder / "sessions.json").read_text()
    assert terminal.json("whoami")["email"] == EMAIL
    (session,) = json.loads(terminal("api", "GET", "/auth/sessions"))["items"]
    assert session["user_agent"].startswith("corral/")


def test_a_session_renews_itself(terminal: Terminal) -> None:
    """By the clock, and because the server refuses its token; commands that run at the same time share one renewal."""
    name, session = terminal.sessions.find() or pytest.fail("not signed in")
    session.expires_at = time.time() - 1
    terminal.sessions.store(name, session)
    assert EMAIL in terminal("whoami")
    _, renewed = terminal.sessions.find() or pytest.fail("not signed in")
    assert renewed.refresh_token != session.refresh_token
    renewed.token = "crl_expired"
    terminal.sessions.store(name, renewed)
    log = terminal.folder / "whoami.log"
    each = [warm().start(("whoami",), cwd=terminal.folder, environ=terminal.environ, log=log) for _ in range(4)]
    assert [process.wait(90) for process in each] == [0] * 4, log.read_text()
    assert terminal.json("whoami")["email"] == EMAIL


def test_a_password_from_standard_input_is_read_without_a_warning_of_python(terminal: Terminal) -> None:
    arguments = ("login", terminal.address, "--email", EMAIL)
    done = terminal.run(*arguments, stdin=f"{PASSWORD}\n")
    assert (done.returncode, "Warning" in done.stderr) == (0, False), done
    assert "Reading the password from standard input." in done.stderr
    nothing = terminal.run(*arguments)
    assert (nothing.returncode, "standard input contains no password" in nothing.stderr) == (2, True), nothing


def test_who_wins(terminal: Terminal) -> None:
    """A token of the environment before the saved session; a server that is named before both."""
    made = terminal.json("whoami")
    key = json.loads(
        terminal("api", "POST", "/security/api-keys", "-f", "name=reads", "-f", 'scopes:=["agents.read"]')
    )["key"]
    refused = terminal.run("cost", environ={"CORRAL_TOKEN": key})
    assert (refused.returncode, refused.stdout) == (1, "")
    assert terminal("cost", "--server", terminal.address, CORRAL_TOKEN=key)
    elsewhere = terminal.run("whoami", environ={"CORRAL_URL": "http://127.0.0.1:9"})
    assert "http://127.0.0.1:9 does not answer: connection refused; check the address" in elsewhere.stderr
    unknown = terminal.run("whoami", "--server", "prod")
    assert (unknown.returncode, "there is no server named prod" in unknown.stderr) == (2, True)
    terminal("login", "--with-token", terminal.address, "--server", "scripts", stdin=key)
    assert terminal("agents", "list", "--server", "scripts")
    terminal("logout", "--server", "scripts")
    assert terminal.json("whoami")["id"] == made["id"]


def test_two_people_at_one_server_are_two_names(terminal: Terminal, tmp_path: Path) -> None:
    """Each signs out of the own session, and the name that was used before becomes the current one again."""
    with terminal.server.sign_in() as admin:
        fields = {"email": "bea@example.org", "full_name": "Bea", "role": "member", "password": PASSWORD}
        admin.post("/admin/users", json=fields).raise_for_status()
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    sessions = SavedSessions(tmp_path / "corral")
    for name, email in (("ada", EMAIL), ("bea", fields["email"]), ("ada", EMAIL), ("second", EMAIL)):
        arguments = ("--server", name, "--email", email, "--password-file", "password")
        terminal("login", terminal.address, *arguments, **environ)
    signed_out = terminal("logout", "--server", "second", **environ)
    assert f"The current server is ada ({terminal.address})." in signed_out
    _, ended = sessions.find("bea") or pytest.fail("not signed in")
    terminal("logout", "--server", "bea", **environ)
    assert EMAIL in terminal("whoami", "--server", "ada", **environ)
    with terminal.server.client(ended.token) as bea:
        assert bea.get("/auth/me").json()["code"] == "session_revoked"
    terminal("login", terminal.address, "--email", fields["email"], "--password-file", "password", **environ)
    assert (EMAIL in terminal("whoami", "--server", "ada", **environ), EMAIL in terminal("whoami", **environ)) == (
        True,
        False,
    )


def test_the_server_of_this_folder_is_found(terminal: Terminal, tmp_path: Path) -> None:
    """It does not listen on the configured address. `login` says where the password goes before it asks for it."""
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "CORRAL_DATA_DIR": str(terminal.folder / "data")}
    signed_out = terminal.run("whoami", environ=environ)
    assert f"you are not signed in to {terminal.address}; run" in signed_out.stderr
    (tmp_path / "wrong").write_text("not the password")
    refused = terminal.run("login", "--password-file", str(tmp_path / "wrong"), stdin=f"{EMAIL}\n", environ=environ)
    assert refused.stderr.startswith(f"Signing in to {terminal.address}.\nEmail")
    assert (
        refused.stderr.splitlines()[-1]
        .removeprefix("Email: ")
        .startswith(f"corral: cannot sign in to {terminal.address}: ")
    )
    signed_in = terminal("login", "--email", EMAIL, "--password-file", "password", **environ)
    assert signed_in == f"Signed in to {terminal.address} as {EMAIL}.\n"
    invited = terminal("user", "invite", "neighbour@example.org", **environ)
    assert invited.splitlines()[-1].startswith(f"{terminal.address}/account/accept-invitation#token=")
    lost = terminal.run("whoami", environ={**environ, "CORRAL_URL": "http://127.0.0.1:9"})
    assert lost.stderr.endswith(
        f"The server for this folder is at {terminal.address}; sign in with `corral login {terminal.address}`\n"
    )


def test_the_server_of_this_folder_goes_before_the_last_one(terminal: Terminal, tmp_path: Path) -> None:
    """Without a session for it, another server answers, and a line says so."""
    last = "http://127.0.0.1:9"
    sessions = SavedSessions(tmp_path / "corral")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "CORRAL_DATA_DIR": str(terminal.folder / "data")}
    sessions.store("last", SavedSession(url=last, token="t"), make_current=True)
    told = f"Using {last}, the server of the last sign-in. The server for this folder is at {terminal.address}; "
    for command in ("cost", "whoami"):
        other = terminal.run(command, "--json", environ=environ)
        assert (other.stdout, other.stderr.startswith(told)) == ("", True), other
        assert other.stderr.count("The server for this folder") == 1, other
    assert "Using" not in terminal.run("cost", "--server", "last", environ=environ).stderr
    assert "Using" not in terminal.run("cost", environ={**environ, "CORRAL_URL": last}).stderr
    _, kept = terminal.sessions.find() or pytest.fail("not signed in")
    local = terminal.address.replace("127.0.0.1", "localhost")
    for url in (local, terminal.address):
        sessions.store("here", SavedSession(url=url, token=kept.token))
        here = terminal.run("whoami", "--json", environ=environ)
        assert (json.loads(here.stdout)["server"], here.stderr) == (url, "")
    sessions.store("here", SavedSession(url=terminal.address, token="an API key"))
    assert terminal("logout", **environ).startswith(f"Signed out of {terminal.address}.")
    signed_in = terminal("login", "--email", EMAIL, "--password-file", str(terminal.folder / "password"), **environ)
    assert signed_in.startswith(f"Signed in to {terminal.address} as ")  # not to the last one


def test_signing_in_with_a_second_factor(terminal: Terminal, tmp_path: Path) -> None:
    with terminal.server.sign_in() as admin:
        fields = {"email": "mia@example.org", "full_name": "Mia", "role": "member", "password": PASSWORD}
        admin.post("/admin/users", json=fields).raise_for_status()
    elsewhere = {"XDG_CONFIG_HOME": str(tmp_path)}
    arguments = ("login", terminal.address, "--email", "mia@example.org", "--password-file", "password")
    assert "Signed in" in terminal(*arguments, **elsewhere)
    seed = json.loads(terminal("api", "POST", "/auth/mfa/setup", "-f", f"password={PASSWORD}", **elsewhere))["secret"]
    codes = json.loads(
        terminal("api", "POST", "/auth/mfa/verify", "-f", f"code={pyotp.TOTP(seed).now()}", **elsewhere)
    )["recovery_codes"]
    assert "Signed out" in terminal("logout", **elsewhere)
    signed_out = terminal.run("whoami", environ={**elsewhere, "CORRAL_URL": terminal.address})
    assert (
        signed_out.stderr
        == f"corral: you are not signed in to {terminal.address}; run `corral login {terminal.address}`\n"
    )
    wrong = terminal.run(*arguments, stdin="000000\n", environ=elsewhere)
    assert (wrong.returncode, "code" in wrong.stderr) == (1, True), wrong
    none = terminal.run(*arguments, environ=elsewhere)
    assert none.returncode == 1
    assert "pass a one-time code or a recovery code on standard input" in none.stderr
    assert "Signed in" in terminal(*arguments, stdin=f"{codes[0]}\n", **elsewhere)
    assert terminal("whoami", **elsewhere).count("second factor: on") == 1


def test_what_must_be_done_first_is_told_at_the_sign_in(terminal: Terminal, tmp_path: Path) -> None:
    with terminal.server.sign_in() as admin:
        for name, must_change in (("noa", False), ("ned", True)):
            fields = {"email": f"{name}@example.org", "full_name": name, "role": "viewer", "password": PASSWORD}
            made = {**fields, "must_change_password": must_change}
            admin.post("/admin/users", json=made).raise_for_status()
    elsewhere = {"XDG_CONFIG_HOME": str(tmp_path), "CORRAL_URL": terminal.address}
    arguments = ("--password-file", "password")
    terminal("settings", "set", "security.require_mfa_roles", '["viewer"]')
    terminal("settings", "set", "security.require_mfa", "true")
    try:
        signed_in = terminal("login", "--email", "noa@example.org", *arguments, **elsewhere)
        who = terminal("whoami", **elsewhere)
    finally:
        terminal("settings", "set", "security.require_mfa", "false")
    how = "Set up a second factor with `corral api POST /auth/mfa/setup -f password=@-` and"
    assert f"\nBefore you can do anything else: {how}" in signed_in
    assert how in who
    assert "mfa_required" not in who
    refused = terminal.run("login", "--email", "ned@example.org", *arguments, environ=elsewhere)
    assert (refused.returncode, "the password must be changed first" in refused.stderr) == (1, True), refused


def test_agents(terminal: Terminal) -> None:
    told = terminal("agents", "create", "Second one", "--prompt", "Be brief.", "--tool", "http.fetch")
    assert "Start it: corral agents start 'Second one'" in told
    terminal("agents", "edit", "second ONE", "--model", "scripted/echo", "-f", "description=Helps")
    assert terminal.json("agents", "show", "Second one")["llm_model"] == "scripted/echo"
    assert [row["n"] for row in terminal.json("agents", "versions", "Second one")["items"]] == [2, 1]
    terminal("agents", "rollback", "Second one", "1")
    assert terminal.json("agents", "show", "Second one")["llm_model"] is None
    refused = terminal.run("agents", "rollback", "Second one", "99").stderr
    assert "there is no version 99 of Second one" in refused
    assert "`corral agents versions 'Second one'`" in refused
    assert "/agents/" not in refused
    for action, status in (("start", "idle"), ("pause", "paused"), ("resume", "idle"), ("stop", "offline")):
        assert terminal.json("agents", action, "Second one")["status"] == status
    assert "Second one" in terminal("agents", "list", "--status", "offline")
    near = terminal.run("agents", "show", "Second")
    assert near.stderr == "corral: there is no agent named Second; did you mean Second one?\n"
    mistyped = terminal.run("agents", "show", "Ecco")
    assert mistyped.stderr == "corral: there is no agent named Ecco; did you mean Echo?\n"
    assert terminal.run("agents", "edit", "Echo").returncode == 2


def test_a_task_is_created_watched_answered_and_shown(terminal: Terminal) -> None:
    made = terminal.json("tasks", "create", "--agent", "Asker", "Paint it", "--priority", "high", "-f", 'tags:=["a"]')
    log, err = terminal.folder / "watch.out", terminal.folder / "watch.err"
    watching = warm().start(
        ("tasks", "watch", made["id"]), cwd=terminal.folder, environ=terminal.environ, log=log, errors=err
    )
    until(lambda: err.exists() and "corral tasks answer" in err.read_text())
    assert terminal.json("status")["waiting"]["items"][0]["id"] == made["id"]
    assert "Which colour?" in terminal("tasks", "show", "paint it")
    terminal("tasks", "answer", "Paint it", "blue")
    assert watching.wait(90) == 0
    told = err.read_text()
    assert 'tool       human.ask {"prompt": "Which colour?"}' in told
    assert "succeeded" in told
    assert '"blue"' in told or "blue" in told.partition("succeeded")[2]
    assert log.read_text() == "so blue\n"
    shown = terminal.json("tasks", "show", made["id"])
    assert (shown["priority"], shown["tags"], shown["result"]) == ("high", ["a"], {"text": "so blue"})
    assert "Step 2: scripted/asks" in terminal("tasks", "logs", made["id"], "--follow")
    logs = terminal.run("tasks", "logs", "Paint it")
    assert "claim 2 of the task; --claim 1 shows the earlier logs" in logs.stderr
    assert "Step 1: scripted/asks" in terminal("tasks", "logs", "Paint it", "--claim", "1")
    assert re.search(r"^worker: +embedded$", terminal("tasks", "show", "Paint it"), re.MULTILINE)
    began = time.monotonic()
    again = terminal.run("tasks", "watch", made["id"]).stderr
    took = time.monotonic() - began  # a line also counts the time since its event was read
    seconds = parse_instant(shown["finished_at"]) - parse_instant(shown["created_at"])
    assert seconds > 0.1
    assert -0.1 <= float(again[: again.index(" s  completed")].split()[-1]) - seconds <= took + 0.1
    assert f"{format_ms(round(seconds * 1000))} from creation to end" in again


def test_ctrl_c_leaves_the_task_and_names_the_command_that_finds_it(terminal: Terminal) -> None:
    out, err = terminal.folder / "left.out", terminal.folder / "left.err"
    running = warm().start(
        ("run", "--agent", "Asker", "Leave it"), cwd=terminal.folder, environ=terminal.environ, log=out, errors=err
    )
    until(lambda: err.exists() and "waiting" in err.read_text())
    running.send_signal(signal.SIGINT)
    assert running.wait(90) == 130
    told = err.read_text()
    assert "Traceback" not in told
    command = told.rpartition("The task continues. Follow it again: corral ")[2].split()
    assert command[:2] == ["tasks", "watch"]
    task_id = command[2]
    assert terminal.json("tasks", "show", task_id)["status"] == "waiting"
    assert terminal.json("tasks", "cancel", task_id, "--reason", "enough")["status"] == "cancelled"
    assert "enough" in terminal("tasks", "explain", task_id)
    assert re.search(r"^cancelled: .*enough", terminal("tasks", "show", task_id), re.MULTILINE)


def test_tasks_that_fail_are_listed_explained_and_retried(terminal: Terminal) -> None:
    failed = terminal.run("run", "--agent", "Refuser", "Do it")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "failed: scripted: No such thing.\n" in failed.stderr
    (row,) = terminal.json("tasks", "list", "--status", "failed", "--agent", "Refuser", "--limit", "5")["items"]
    explained = terminal("tasks", "explain", row["id"])
    assert "No such thing." in explained
    assert "  claim 1: failed, " in explained
    assert terminal.json("tasks", "retry", row["id"], "--from-start")["status"] == "pending"
    watched = terminal.run("tasks", "watch", row["id"])  # from the first failure over the retry to the second one
    told = [words[2] for line in watched.stderr.splitlines() if len(words := line.split()) > 2 and words[1] == "s"]
    assert watched.returncode == 1
    once = ["assigned", "started", "failed", "dead_lettered"]
    assert told == [*once, "retried", *once[:3]]
    terminal("run", "--agent", "Echo", "Twice")
    terminal("run", "--agent", "Echo", "Twice")
    first = terminal.json("tasks", "create", "First", "--agent", "Echo", "-f", "available_at=2100-01-01T00:00:00Z")[
        "id"
    ]
    second = terminal.json("tasks", "create", "Second", "--agent", "Echo", "-f", f'depends_on:=["{first}"]')["id"]
    assert f"See why it waits: corral tasks explain {first}" in terminal("tasks", "explain", second)
    terminal("tasks", "cancel", first)
    ambiguous = terminal.run("tasks", "show", "Twice")
    assert ambiguous.stderr.startswith("corral: 2 tasks are named Twice; give one of these ids instead: ")


def test_a_retried_task_that_has_not_ended_again_is_watched(terminal: Terminal) -> None:
    """The first run has failed, and the second one waits for the agent."""
    terminal.run("run", "--agent", "Refuser", "Try again")
    task_id = terminal.json("tasks", "show", "Try again")["id"]
    terminal("agents", "stop", "Refuser")
    terminal("tasks", "retry", task_id)
    assert re.search(r"^waiting for: +The agent is offline.\n +Start it: ", terminal("tasks", "show", task_id), re.M)
    err = terminal.folder / "again.err"
    watching = warm().start(
        ("tasks", "watch", task_id),
        cwd=terminal.folder,
        environ=terminal.environ,
        log=terminal.folder / "again.out",
        errors=err,
    )
    until(lambda: err.exists() and "The agent is offline" in err.read_text())
    terminal("agents", "start", "Refuser")
    assert watching.wait(90) == 1
    assert "Traceback" not in err.read_text()
    assert err.read_text().count("No such thing.") == 1


def test_a_name_that_nothing_has_is_told_with_the_command_that_lists_all(terminal: Terminal) -> None:
    missing = "0190a0b0-0000-7000-8000-000000000000"
    for line in MISSING.strip().splitlines():
        command, _, listing = line.partition(" -> ")
        arguments = [missing if each == "ID" else each for each in command.split()]
        done = terminal.run(*arguments)
        (told,) = done.stderr.splitlines()
        assert (done.returncode, told.lower().startswith("corral: there is no ")) == (1, True), (command, told)
        assert terminal.address in told or "/" in told, told
        assert (missing if "ID" in command else "Nothing") in told, told
        assert f"corral {listing}" in told, told


MISSING = """
agents show Nothing -> agents list
agents edit Nothing --tool web.fetch -> agents list
agents start ID -> agents list
agents versions Nothing -> agents list
agents rollback Nothing 1 -> agents list
run --agent Nothing Work -> agents list
tasks create --agent Nothing Work -> agents list
tasks list --agent Nothing -> agents list
tasks show Nothing -> tasks list
tasks show ID -> tasks list
tasks watch Nothing -> tasks list
tasks logs ID -> tasks list
tasks explain Nothing -> tasks list
tasks cancel Nothing -> tasks list
tasks retry ID -> tasks list
tasks answer ID yes -> tasks list
workers show Nothing -> workers list
workers approve ID -> workers list
workers drain Nothing -> workers list
approvals show Nothing -> approvals list
approvals show ID -> approvals list --status all
approvals approve ID -> approvals list --status all
approvals reject Nothing -> approvals list
approvals comment ID text -> approvals list --status all
dead-letter show ID -> dead-letter list
dead-letter retry Nothing -> dead-letter list
dead-letter discard ID -> dead-letter list
messages read ID -> messages list
messages ack Nothing -> messages list
messages list --agent Nothing -> agents list
messages send --to-agent Nothing text -> agents list
ssh show Nothing -> ssh list
ssh run Nothing id -> ssh list
circuit-breakers show Nothing -> circuit-breakers list
circuit-breakers force-open Nothing -> circuit-breakers list
circuit-breakers force-close Nothing -> circuit-breakers list
circuit-breakers reset Nothing -> circuit-breakers list
tools show Nothing -> tools list
mcp show Nothing -> mcp list
mcp refresh Nothing -> mcp list
mcp edit Nothing -f enabled:=false -> mcp list
mcp accept Nothing --all -> mcp list
mcp remove Nothing -> mcp list
workflows show Nothing -> workflows list
workflows validate ID -> workflows list
workflows run Nothing -> workflows list
workflows runs Nothing -> workflows list
workflows watch ID -> workflows runs
workflows show-run ID -> workflows runs
workflows edit Nothing -f description=x -> workflows list
workflows delete Nothing -> workflows list
workflows cancel ID -> workflows runs
workflows pause ID -> workflows runs
workflows resume Nothing -> workflows list
workflows show-run Nothing/1 -> workflows list
triggers edit Nothing --cron @daily -> triggers list
files list --task Nothing -> tasks list
dead-letter show Nothing -> dead-letter list
workflows retry ID -> workflows runs
workflows answer ID step -f a=b -> workflows runs
triggers show Nothing -> triggers list
triggers fire ID -> triggers list
triggers toggle Nothing -> triggers list
triggers delete Nothing -> triggers list
triggers history Nothing -> triggers list
triggers test ID -> triggers list
files show ID -> files list
files delete ID -> files list
files download ID -> files list
template show Nothing -> template list
template uninstall ID -> template installations
template upgrade ID -> template installations
template uninstall Nothing -> template installations
webhooks show ID -> webhooks list
webhooks disable ID -> webhooks list
notifications read ID -> notifications list
notifications show ID -> notifications list
notifications retry Nothing -> notifications deliveries
notifications test-channel Nothing -> notifications channels
notifications edit-rule Nothing --enable -> notifications rules
"""


@pytest.mark.parametrize(
    "command",
    [
        "agents edit",
        "mcp edit",
        "notifications edit-channel",
        "notifications edit-rule",
        "ssh edit",
        "webhooks edit",
        "workflows edit",
    ],
)
def test_an_edit_without_a_change_is_refused(terminal: Terminal, command: str) -> None:
    done = terminal.run(*command.split(), "Anything")
    assert (done.returncode, "nothing to change; give " in done.stderr) == (2, True), done


def test_a_task_that_requires_a_tool_waits_for_a_worker_that_offers_it(terminal: Terminal) -> None:
    terminal("agents", "create", "Writer", "--model", "scripted/echo", "--tool", "workspace.write", "--start")
    required = ("--require-tool", "workspace.write")
    waiting = terminal.json("tasks", "create", "--agent", "Writer", *required, "Wait")
    assert (waiting["required_tools"], waiting["status"]) == (["workspace.write"], "pending")
    assert "No online worker offers workspace.write" in terminal("tasks", "explain", waiting["id"])
    left = terminal.run("run", "--agent", "Writer", *required, "--timeout", "1", "Wait too")
    assert "the task " in left.stderr
    done = terminal.run("run", "--agent", "Writer", "Do not wait")
    assert (done.returncode, "warning: The agent may use workspace.write, but the worker" in done.stderr) == (0, True)
    assert "the worker embedded does not offer it" in terminal("tasks", "explain", "Do not wait")


def test_a_misspelt_tool_is_corrected(terminal: Terminal) -> None:
    made = ("agents", "create", "Typist", "--model", "scripted/echo", "--tool", "human.ask", "--tool", "http.fetsh")
    misspelt = terminal.run(*made, "--start").stderr
    assert "did you mean http.fetch? Correct it: corral agents edit Typist --tool human.ask --tool http.f" in misspelt
    terminal("run", "--agent", "Typist", "Type this")
    explained = terminal("tasks", "explain", "Type this")
    assert "http.fetsh, but no active plugin and no online worker offers it" in explained
    assert "--require-tool" not in explained
    assert (
        "offers the tool; `corral tools list` shows" in terminal.run("agents", "edit", "Typist", "--tool", "q.q").stderr
    )


def test_the_hint_for_a_model_without_its_provider_works(terminal: Terminal) -> None:
    """A provider that Corral does not know needs a kind and a URL, one that it knows only a key."""
    (terminal.folder / "key").write_text("sk-0123456789abcdef\n")
    for model, given in (("nope/none", " -f kind=openai -f base_url=URL"), ("groq/none", "")):
        provider = model.partition("/")[0]
        command = f"corral api POST /llm/providers -f name={provider}{given} -f api_key=@FILE"
        told = terminal.run("agents", "create", f"Without {provider}", "--model", model).stderr
        assert f"Configure it ({command}{', or with kind=anthropic' if given else ''}), or choose another" in told
        typed = command.replace("URL", "https://llm.invalid/v1").replace("FILE", "key").split()
        assert json.loads(terminal(*typed[1:]))["name"] == provider
        terminal("api", "DELETE", f"/agents/{terminal.json('agents', 'show', f'Without {provider}')['id']}")
        terminal("api", "DELETE", f"/llm/providers/{provider}")
    fields = ("-f", "name=blind", "-f", 'scopes:=["agents.read", "agents.write"]')
    key = json.loads(terminal("api", "POST", "/security/api-keys", *fields))["key"]
    made = terminal.run("agents", "create", "Blind", "--model", "groq/none", environ={"CORRAL_TOKEN": key})
    assert "configured: unknown, because you may not read the providers. Configure it" in made.stderr
    assert "name=groq -f api_key=@FILE, and -f kind=openai -f base_url=URL if Corral does not know" in made.stderr
    terminal("api", "DELETE", f"/agents/{terminal.json('agents', 'show', 'Blind')['id']}")


def test_workers_cost_events_and_status(terminal: Terminal) -> None:
    with terminal.server.sign_in() as admin:
        admin.post("/workers/register", json={"name": "laptop"}).raise_for_status()
    assert "corral workers approve laptop" in terminal("workers", "show", "laptop")
    assert "corral workers list --status pending" in terminal("status")
    assert terminal.json("workers", "approve", "Laptop", "--group", "desk")["group"] == "desk"
    assert terminal.json("workers", "drain", "embedded")["status"] == "draining"
    assert terminal.json("workers", "drain", "--resume", "embedded")["status"] == "online"
    terminal("run", "--agent", "Echo", "Cost something")
    assert "Cost something" in terminal("cost", "--by", "task")
    assert "desk" in terminal("workers", "list")
    cost = terminal("cost")
    assert "$0.00" in cost
    assert "0.000000" not in cost
    for by in ("agent", "model", "day", "task"):
        assert terminal.json("cost", "--by", by, "--days", "2")[f"by_{by}"]
    events = [json.loads(line) for line in terminal("events", "--type", "worker.*", "--json").splitlines()]
    assert {"worker.approved", "worker.draining"} <= {event["event"] for event in events}
    assert "worker.approved" in terminal("events", "--event", "worker.approved")
    assert len(terminal("events", "--limit", "3").splitlines()) == 3
    # Whoever may see few of the events is shown as many.
    fields = ("-f", "name=events", "-f", 'scopes:=["agents.read"]')
    key = json.loads(terminal("api", "POST", "/security/api-keys", *fields))["key"]
    seen = [json.loads(line) for line in terminal("events", "--limit", "3", "--json", CORRAL_TOKEN=key).splitlines()]
    assert (len(seen), "task" in {event["object"]["type"] for event in seen}) == (3, False)
    status = terminal.json("status")
    assert (status["server"], status["user"]["email"], status["version"]) == (terminal.address, EMAIL, "0.1.0")


def test_status_tells_of_an_engaged_kill_switch(terminal: Terminal) -> None:
    assert "kill switch" not in terminal("status")
    terminal("api", "POST", "/admin/kill-switch", "-f", "engaged:=true", "-f", "reason=A fire")
    try:
        assert re.search(r"^kill switch: +engaged: A fire; .*corral kill-switch off", terminal("status"), re.MULTILINE)
        assert terminal.json("status")["kill_switch"]["engaged"] is True
    finally:
        terminal("api", "POST", "/admin/kill-switch", "-f", "engaged:=false")


def test_status_tells_of_open_breakers_and_used_up_budgets(terminal: Terminal) -> None:
    quiet = terminal("status")
    assert "circuit breakers:" not in quiet
    assert "budget:" not in quiet
    terminal("circuit-breakers", "force-open", "llm:scripted", "--reason", "The contract has ended.")
    terminal("cost", "budget", "set", "--limit", "0")
    terminal("agents", "edit", "Asker", "-f", "monthly_budget_usd:=0")
    try:
        told = terminal("status")
        assert "llm:scripted is forced open: The contract has ended. Close it: corral circuit-breakers force-" in told
        assert re.search(r"^budget: +used up: \$0.00 of \$0.00 spent .*corral cost budget set --limit", told, re.M)
        own = "the agent Asker has used up its own budget, $0.00 of $0.00. Raise it: corral agents edit Asker "
        assert own in told
        assert terminal.json("status")["budget"]["status"] == "exceeded"
    finally:
        terminal("circuit-breakers", "force-close", "llm:scripted")
        terminal("cost", "budget", "set", "--limit", "none")
        terminal("agents", "edit", "Asker", "-f", "monthly_budget_usd:=null")


def test_approvals_name_who_asks(terminal: Terminal) -> None:
    assert "corral approvals list --status all" in terminal("approvals", "list")
    assert (
        terminal("approvals", "list", "--status", "all", "--risk", "critical")
        == "There are no such approval requests.\n"
    )
    steps = terminal.folder / "publish.json"
    steps.write_text(
        json.dumps({"steps": [{"name": "check", "step_type": "approval", "config": {"title": "Publish it?"}}]})
    )
    terminal("workflows", "create", "Publish", "--input", str(steps))
    run = terminal.json("workflows", "run", "Publish")["id"]
    until(lambda: terminal.json("approvals", "list")["items"] != [])
    for shown in (terminal("approvals", "list"), terminal("approvals", "show", "Publish it?")):
        assert "workflow Publish, run 1, step check" in shown
    terminal("workflows", "cancel", run)
    terminal("approvals", "ask", "Buy it")
    assert f"user {EMAIL}" in terminal("approvals", "list")
    terminal("approvals", "cancel", "Buy it")


def test_a_run_is_followed_across_a_restart_of_the_server(terminal: Terminal) -> None:
    """Ctrl-C leaves the run, and names the command that follows it again."""
    steps = 'steps:=[{"name": "check", "step_type": "approval", "config": {"title": "After the restart?"}}]'
    terminal("workflows", "create", "Restarted", "-f", steps)
    out, err = terminal.folder / "restarted.out", terminal.folder / "restarted.err"
    arguments = ("workflows", "run", "Restarted", "--wait")
    following = warm().start(arguments, cwd=terminal.folder, environ=terminal.environ, log=out, errors=err)
    until(lambda: err.exists() and "check waiting" in err.read_text())
    terminal.server.stop()
    until(lambda: "waiting for the server" in err.read_text())
    terminal.server.start()
    terminal("approvals", "approve", "After the restart?")
    assert following.wait(90) == 0, err.read_text()
    assert "run completed" in err.read_text()
    err = terminal.folder / "left-run.err"
    left = warm().start(arguments, cwd=terminal.folder, environ=terminal.environ, log=out, errors=err)
    until(lambda: err.exists() and "check waiting" in err.read_text())
    left.send_signal(signal.SIGINT)
    assert left.wait(90) == 130
    command = err.read_text().rpartition("The run continues. Follow it again: corral ")[2].split()
    assert command[:2] == ["workflows", "watch"]
    terminal("workflows", "cancel", command[2])


def test_an_invitation_is_made_by_who_is_signed_in(terminal: Terminal, tmp_path: Path) -> None:
    """In a folder without an installation, as on a laptop."""
    elsewhere = {"CORRAL_DATA_DIR": str(tmp_path)}
    invited = terminal("user", "invite", "new@example.org", "--role", "viewer", **elsewhere)
    assert "Invited new@example.org (viewer)" in invited
    assert invited.splitlines()[-1].startswith("http")
    assert terminal.run("user", "invite", "no-address", "--server", terminal.address).returncode == 1


def test_events_are_followed(terminal: Terminal) -> None:
    out = terminal.folder / "events.out"
    arguments = ("events", "--follow", "--limit", "0", "--type", "agent.created")
    following = warm().start(arguments, cwd=terminal.folder, environ=terminal.environ, log=out)
    number = iter(range(100))
    until(lambda: terminal("agents", "create", f"Event {next(number)}") and "agent.created" in out.read_text())
    following.send_signal(signal.SIGINT)
    assert following.wait(90) == 0
    assert "Traceback" not in out.read_text()


def test_settings_are_read_and_changed(terminal: Terminal) -> None:
    told = terminal("settings", "set", "general.site_name", "Ranch")
    assert told == "general.site_name is Ranch. Undo it: corral settings reset general.site_name\n"
    assert re.search(r"^general.site_name +Ranch +database ", terminal("settings", "list", "--changed"), re.M)
    assert re.search(rf"general.site_name +Corral +Ranch +{EMAIL}", terminal("settings", "history"))
    undone = terminal("settings", "reset", "general.site_name")
    assert undone == "general.site_name is Corral, the default (it was Ranch).\n"
    assert "general.site_name" not in terminal("settings", "list", "--changed")
    shown = terminal("settings", "show", "http.in_flight")
    assert re.search(r"^type: +int, at least 1, at most 1000$", shown, re.M)
    refused = terminal.run("settings", "set", "http.in_flight", "5000")
    assert (refused.returncode, "1000" in refused.stderr) == (1, True), refused
    terminal("settings", "set", "http.cors_origins", '["https://example.org"]')
    assert terminal.json("settings", "show", "http.cors_origins")["value"] == ["https://example.org"]
    no_json = terminal.run("settings", "set", "http.cors_origins", "https://example.org")
    assert (no_json.returncode, "give the value as JSON" in no_json.stderr) == (2, True), no_json
    terminal("settings", "reset", "http.cors_origins")
    assert terminal.run("settings", "set", "mail.password", "on the command line").returncode == 2
    assert "mail.password is ********." in terminal("settings", "set", "mail.password", stdin="a long password\n")
    terminal("settings", "reset", "mail.password")
    unknown = terminal.run("settings", "set", "llm.default_model", "scripted/no-such")
    assert unknown.returncode == 0
    assert "warning: no provider lists the model scripted/no-such, so agents without a model of" in unknown.stderr
    known = terminal.run("settings", "set", "llm.default_model", "scripted/echo")
    assert (known.returncode, known.stderr) == (0, "")
    terminal("settings", "reset", "llm.default_model")
    mistyped = terminal.run("settings", "show", "general.sitename")
    assert mistyped.stderr == "corral: there is no setting general.sitename; did you mean general.site_name?\n"


def test_a_trigger_of_a_name_that_exists_is_told_with_the_other_id(terminal: Terminal) -> None:
    arguments = ("triggers", "create", "Doubled", "--manual", "--task", "Say it")
    assert "same name" not in terminal(*arguments)
    (first,) = (each["id"] for each in terminal.json("triggers", "list")["items"] if each["name"] == "Doubled")
    assert f"Other triggers have the same name, so use the id of the trigger. The others: {first}" in terminal(
        *arguments
    )


def test_a_workflow_without_steps_or_instructions_is_created_with_a_warning(terminal: Terminal) -> None:
    made = terminal.run("workflows", "create", "Hollow")
    assert "has no steps, so it cannot run" in made.stderr
    assert "Run it" not in made.stdout
    validated = terminal.run("workflows", "validate", "Hollow")
    assert (validated.returncode, "is valid" in validated.stdout) == (0, False)
    assert "has no steps, so it cannot run" in validated.stderr


def test_an_approval_by_a_rule_is_told_with_the_rule(terminal: Terminal) -> None:
    terminal("settings", "set", "approvals.auto_approve", '[{"id": "small", "when": "payload < 10"}]')
    told = terminal("approvals", "ask", "Paper", "-f", "payload:=5", "-f", "risk=low")
    assert "It is approved by rule:small." in told
    assert "expires" not in told
    terminal("settings", "reset", "approvals.auto_approve")
    assert "It expires at" in terminal("approvals", "ask", "Ink", "-f", "payload:=5")
    terminal("approvals", "cancel", "Ink")


def test_a_trigger_creates_tasks_for_an_agent(terminal: Terminal) -> None:
    terminal("triggers", "create", "For one", "--manual", "--task", "Say it", "--agent", "Refuser")
    terminal("triggers", "edit", "For one", "--agent", "Echo")
    shown = terminal("triggers", "show", "For one")
    assert re.search(r"^action: +create_task Say it for Echo$", shown, re.M)
    wrong = terminal.run("triggers", "create", "Wrong", "--manual", "--workflow", "Any", "--agent", "Echo")
    assert (wrong.returncode, "--agent can be used only with --task" in wrong.stderr) == (2, True), wrong
    terminal("triggers", "delete", "For one")


def test_options_of_a_trigger_keep_the_rest_of_its_config(terminal: Terminal) -> None:
    signed = ("-f", 'config:={"auth": "hmac_sha256"}')
    task = ("--task", "Say it", "--agent", "Echo")
    made = json.loads(terminal("triggers", "create", "Signed", "--webhook", *task, *signed, "--json"))
    assert (made["config"]["auth"], made["secret"] is not None) == ("hmac_sha256", True), made
    wrong = terminal.run("triggers", "create", "Wrong", "--webhook", *task, "-f", "type=manual")
    assert (wrong.returncode, "--field or --input sets the type manual" in wrong.stderr) == (2, True), wrong
    terminal("triggers", "create", "At dawn", "--cron", "0 7 * * *", *task)
    zone = 'config:={"expression": "0 7 * * *", "timezone": "Asia/Tokyo"}'
    edited = json.loads(terminal("triggers", "edit", "At dawn", "-f", zone, "--cron", "0 8 * * *", "--json"))
    assert edited["config"] == {"expression": "0 8 * * *", "timezone": "Asia/Tokyo"}
    for name in ("Signed", "At dawn"):
        terminal("triggers", "delete", name)


def test_any_operation_can_be_called(terminal: Terminal) -> None:
    assert len(json.loads(terminal("api", "get", "/agents", "-f", "limit=2"))["items"]) == 2
    assert len(json.loads(terminal("api", "GET", "/api/v1/agents?limit=1"))["items"]) == 1
    whole = json.loads(terminal("api", "GET", "/events", "--all", "-f", "limit=2", "-f", "types=agent.created"))
    assert len(whole["items"]) >= 3
    body = json.dumps({"name": "From a file"})
    assert json.loads(terminal("api", "POST", "agents", "--input", "-", stdin=body))["name"] == "From a file"
    (terminal.folder / "name").write_text("By a file")
    assert json.loads(terminal("api", "POST", "/agents", "-f", "name=@name"))["name"] == "By a file"
    assert terminal("api", "GET", "/problems/not_found")
    assert len(json.loads(terminal("api", "GET", f"{terminal.address}/api/v1/agents?limit=1"))["items"]) == 1
    for url in ("https://example.org/tasks", "//example.org/tasks", f"{terminal.address}.example.org/tasks"):
        foreign = terminal.run("api", "GET", url)
        assert (foreign.returncode, "choose the server with --server" in foreign.stderr) == (2, True), foreign
    image = "data:image/svg+xml;base64," + "A" * 300
    terminal("agents", "create", "Painted", "-f", f"description={image}")
    seen = terminal.on_a_terminal("api", "GET", "/agents?search=Painted")
    assert image not in seen
    assert "(326 characters; redirect the output to a file to get all of them)" in seen
    assert image in terminal("api", "GET", "/agents?search=Painted")
    address = "base_url=http://169.254.169.254/v1"
    blocked = terminal.run("api", "POST", "/llm/providers", "-f", "name=near", "-f", "kind=openai", "-f", address)
    assert (blocked.returncode, blocked.stderr.count("169.254.169.254 ")) == (1, 1), blocked.stderr
    agent = json.loads(terminal("api", "POST", "/agents", "-f", "name=With a version"))
    change = ("api", "PATCH", f"/agents/{agent['id']}", "-f", "name=Changed", "-H", 'If-Match: "1"')
    assert json.loads(terminal(*change, "-H", "Accept-Language: de"))["version"] == 2
    assert "current version is 2" in terminal.run(*change).stderr
    for refused in ("If-Match", "If Match: 1", "Authorization: Bearer x"):
        assert terminal.run("api", "GET", "/agents", "-H", refused).returncode == 2
    assert terminal.run("api", "GET", "/agents", "--all", "-H", "If-Match: 1").returncode == 2
    wrong = terminal.run("api", "POST", "/agents", "-f", "name=x", "-f", "max_concurrent_tasks=two")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "/max_concurrent_tasks: " in wrong.stderr
    for arguments in (("-f", "x"), ("-f", "x:=["), ("--all",), ("--input", "password")):
        assert terminal.run("api", "POST", "/agents", *arguments).returncode == 2


def test_names_are_completed(terminal: Terminal, tmp_path: Path) -> None:
    """The script that is printed completes in a real shell, where names with spaces are quoted."""
    terminal("agents", "create", "Two words")
    script = tmp_path / "corral.bash"
    script.write_text(terminal("completion", "bash"))
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "corral").write_text(f'#!/bin/sh\nexec {sys.executable} -m corral "$@"\n')
    (folder / "corral").chmod(0o755)
    words = "COMP_WORDS=(corral agents show Two); COMP_CWORD=3"
    ask = f'source {script}; {words}; _corral_completion corral; echo "$COMPREPLY"'
    path = {**terminal.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", ask], env=path, cwd=terminal.folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "Two\\ words\n", done
    for shell in ("zsh", "fish"):
        assert "_CORRAL_COMPLETE" in terminal("completion", shell)


def test_colours_are_for_people(terminal: Terminal) -> None:
    assert "\x1b[" in terminal.on_a_terminal("agents", "list")
    assert "\x1b[" not in terminal.on_a_terminal("agents", "show", "Echo", NO_COLOR="1")
    assert "\x1b[" not in terminal("agents", "list")


def test_what_is_wrong_is_one_line_with_the_remedy(terminal: Terminal) -> None:
    cases = (
        ("ftp://example.org", "ftp://example.org must begin with http:// or https://"),
        ("http://[::1", "is not a valid URL"),
        (terminal.address.replace("http:", "https:"), "it does not speak TLS on this port; try http://"),
        ("http://127.0.0.1:1", "connection refused"),
        ("http://no-such-host.invalid", "check the address and the network"),
    )
    for url, words in cases:
        done = terminal.run("login", url, "--email", EMAIL, "--password-file", "password")
        assert done.returncode in (1, 2)
        assert words in done.stderr.splitlines()[-1], done


def test_a_server_that_does_not_run_the_plugin_of_a_command_is_told(terminal: Terminal) -> None:
    @click.group()
    def root() -> None: ...

    @root.group()
    def barn() -> None: ...

    @barn.command("list")
    @client_command
    def list_barns(client: ApiClient, *, as_json: bool) -> None:
        client.get("/barns")

    found = terminal.sessions.find(terminal.address)
    assert found is not None
    done = CliRunner().invoke(
        root, ["barn", "list", "--server", terminal.address], env={"CORRAL_TOKEN": found[1].token}
    )
    assert "the server does not run this command's plugin" in str(done.exception)


def test_client_commands_import_little(terminal: Terminal) -> None:
    """A command is there in 0.7 s only if it does not import the server. Its own imports are most of its time."""
    for arguments in (("agents", "list"), ("tasks", "list"), ("status",), ("worker", "--help")):
        call = "from corral.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        code = f"import sys; sys.argv[1:] = {arguments!r}\n{call}print([*{{*sys.modules}} & {{*{HEAVY!r}}}])"
        done = subprocess.run(
            [sys.executable, "-c", code], env=terminal.environ, cwd=terminal.folder, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]", done


def test_a_name_of_two_workflows_is_told_with_their_ids(terminal: Terminal) -> None:
    steps = """steps:=[{"name": "a", "step_type": "transform", "config": {"value": 1}}]"""
    first = terminal.json("workflows", "create", "Twice", "-f", steps)["id"]
    told = terminal("workflows", "create", "Twice", "-f", steps)
    second = re.search(r"\((.+?)\)", told)
    assert second is not None
    assert f"corral workflows run {second[1]}" in told
    assert first in told
    done = terminal.run("workflows", "run", "Twice")
    assert (done.returncode, first in done.stderr, second[1] in done.stderr) == (1, True, True), done
    assert terminal("workflows", "delete", first) == f"Deleted Twice ({first}).\n"
    assert terminal.json("workflows", "run", "Twice", "--wait")["output"] == {"a": 1}


def test_what_is_not_valid_is_told_with_its_place(terminal: Terminal) -> None:
    steps = """steps:=[{"name": "a", "step_type": "condition", "config": {"expression": "input.n"}, "agent_id": 5}]"""
    done = terminal.run("workflows", "create", "Wrong", "-f", steps, "-f", "status=hidden")
    assert done.returncode == 1
    first, *lines = done.stderr.splitlines()
    assert first == "corral: 2 fields are not valid"
    assert [line.partition(":")[0] for line in lines] == ["  /status", "  /steps/0/agent_id"]
    gone = terminal.run("workflows", "watch", "01890a5d-ac96-774b-bcce-b302099a8057")
    assert gone.stderr.startswith("corral: there is no workflow run 01890a5d")
