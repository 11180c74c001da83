"""Accounts from the command line: through the service, as the operating-system user, no password in an argument."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp

from corral.cli.command_kernels import operator_name
from corral.testing.server import ServerProcess

PASSWORD = "a rather long phrase"


def create(corral: Any, email: str, *options: str, environ: dict[str, str] | None = None) -> Any:
    return corral("user", "create", email, "--password-file", "-", "--json", *options, stdin=PASSWORD, environ=environ)


def test_an_account_is_made_listed_and_changed(corral: Any) -> None:
    made = create(corral, "Ada@Example.org", "--admin", "--full-name", "Ada")
    assert made.status == 0, made
    assert {"email": "Ada@Example.org", "role": "admin", "is_active": True}.items() <= made.json().items()
    assert PASSWORD not in made.out + made.err
    assert create(corral, "ada@example.ORG").status == 1
    bob = create(corral, "bob@example.org", "--must-change").json()
    assert (bob["role"], bob["must_change_password"]) == ("member", True)
    listed = corral("user", "list", "--json").json()["items"]
    assert [user["email"] for user in listed] == ["bob@example.org", "Ada@Example.org"]
    assert corral("user", "deactivate", "bob@example.org").status == 0
    inactive = corral("user", "list", "--inactive", "--json").json()["items"]
    assert [user["email"] for user in inactive] == ["bob@example.org"]
    assert corral("user", "activate", "bob@example.org", "--json").json()["is_active"]
    assert corral("user", "role", "bob@example.org", "auditor", "--json").json()["role"] == "auditor"
    assert [row["email"] for row in corral("user", "list", "--role", "auditor", "--json").json()["items"]] == [
        "bob@example.org"
    ]


def test_a_password_can_be_piped_to_the_command(corral: Any) -> None:
    made = corral("user", "create", "ada@example.org", "--json", stdin=f"{PASSWORD}\n")
    assert (made.status, made.err) == (0, "Reading the password from standard input.\n"), made
    assert corral("user", "reset-password", "ada@example.org", stdin="another rather long phrase").status == 0


def test_a_password_in_another_encoding_is_refused(corral: Any) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "corral", "user", "create", "ada@example.org"],
        input="correct horse b\u00e4ttery\n".encode("latin-1"),
        cwd=corral.home,
        env=corral.environ,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (made.returncode, b"Traceback" in made.stderr) == (2, False), made
    assert b"corral: " in made.stderr
    assert b"not UTF-8" in made.stderr


def test_the_last_admin_stays(corral: Any) -> None:
    create(corral, "ada@example.org", "--admin")
    for arguments in (("deactivate", "ada@example.org"), ("role", "ada@example.org", "member")):
        done = corral("user", *arguments)
        assert done.status == 1
        assert done.err.strip() == "corral: This is the last active admin; make another user an admin first"


def test_refusals_say_what_to_do(corral: Any) -> None:
    weak = corral("user", "create", "ada@example.org", "--password-file", "-", stdin="short\n")
    assert weak.status == 1
    assert "at least 12 characters" in weak.err
    assert corral("user", "create", "no address", "--password-file", "-", stdin=PASSWORD).status == 1
    prompt = corral("user", "create", "ada@example.org")
    assert prompt.status == 2
    assert "--password-file" in prompt.err
    missing = corral("user", "create", "a@b.example", "--password-file", "missing")
    assert missing.status == 2
    assert missing.err.rstrip().endswith("--password-file missing cannot be read: No such file or directory")
    (corral.home / "latin").write_bytes("correct horse b\u00e4ttery".encode("latin-1"))
    assert "latin is not UTF-8: " in corral("user", "create", "a@b.example", "--password-file", "latin").err
    assert corral("user", "create", "a@b.example", "--password-file", "-").status == 2
    assert "corral user list" in corral("user", "deactivate", "nobody@example.org").err
    assert corral("user", "list", "--json").json()["items"] == []


def test_ways_back_in_and_the_end_of_an_account(corral: Any) -> None:
    create(corral, "ada@example.org", "--admin")
    create(corral, "bob@example.org", "--full-name", "Bob")
    assert corral("user", "show", "BOB@example.org", "--json").json()["full_name"] == "Bob"
    assert re.search(r"^full name: +Bob$", corral("user", "show", "bob@example.org").out, re.MULTILINE)
    assert corral("user", "unlock", "bob@example.org", "--json").json()["locked_until"] is None
    assert corral("user", "reset-mfa", "bob@example.org", "--json").json()["mfa_enabled"] is False
    active = corral("user", "purge", "bob@example.org", stdin="bob@example.org\n")
    assert (active.status, "deactivate" in active.err) == (1, True), active
    corral("user", "deactivate", "bob@example.org")
    mistyped = corral("user", "purge", "bob@example.org", stdin="bob\n")
    assert (mistyped.status, "nothing was changed" in mistyped.err) == (1, True), mistyped
    purged = corral("user", "purge", "bob@example.org", "--json", stdin="bob@example.org\n")
    assert purged.status == 0, purged
    assert {"email": "", "full_name": "deleted user", "is_active": False}.items() <= purged.json().items()
    assert [user["email"] for user in corral("user", "list", "--json").json()["items"]] == ["ada@example.org"]
    assert create(corral, "bob@example.org").status == 0  # the address is free
    corral("user", "deactivate", "bob@example.org")
    assert corral("user", "purge", "bob@example.org", "--yes").status == 0
    assert create(corral, "bob@example.org").status == 0


def test_an_invitation_is_a_link_for_a_browser(corral: Any) -> None:
    assert create(corral, "ada@example.org", "--admin").status == 0
    invited = corral("user", "invite", "bob@example.org", "--role", "viewer")
    assert invited.status == 0, invited
    assert re.search(r"^http://127.0.0.1:8000/account/accept-invitation#token=[\w-]{43}$", invited.out, re.MULTILINE)
    assert "No server runs here." in invited.out
    again = corral("user", "invite", "bob@example.org")
    assert again.status == 1
    assert re.search(r"already an invitation .*: corral invitations revoke bob@example\.org$", again.err.strip())
    named = corral("user", "invite", "eve@example.org", "--json", environ={"CORRAL_PUBLIC_URL": "https://c.example"})
    assert named.json()["url"].startswith("https://c.example/account/accept-invitation#token=")
    assert (named.json()["role"], named.json()["status"]) == ("member", "pending")


def test_the_kill_switch_is_at_hand_on_the_machine(corral: Any) -> None:
    assert corral("kill-switch", "on").status == 2
    nowhere = corral("kill-switch", "on", "--reason", "a drill")
    assert (nowhere.status, "no installation" in nowhere.err) == (3, True)
    assert not (corral.home / "corral-data").exists()  # nothing is engaged here, and nothing was made
    assert corral("migrate").status == 0
    engaged = corral("kill-switch", "on", "--reason", "a drill", "--cancel", "--json").json()
    assert (engaged["engaged"], engaged["mode"], engaged["reason"]) == (True, "cancel", "a drill")
    released = corral("kill-switch", "off", "--json", environ={"CORRAL_URL": "https://corral.example"})
    assert released.json()["engaged"] is False
    assert "`corral kill-switch off` acts on the data folder" in released.err
    assert str(corral.home / "corral-data") in released.err
    for command in (("kill-switch",), ("kill-switch", "on"), ("kill-switch", "off"), ("audit", "verify")):
        assert "access to the data folder is sufficient" in " ".join(corral(*command, "--help").out.split())


ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("sqlite", "postgres")]


@pytest.fixture(params=ENGINES)
def running(corral: Any, request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, dict[str, str]]]:
    """A server, and the variables by which commands find its installation."""
    environ = {"CORRAL_DATA_DIR": str(corral.home / "data"), "CORRAL_CONFIG": "/dev/null"}
    if request.param == "postgres":
        environ["CORRAL_DATABASE_URL"] = request.getfixturevalue("postgres_server").create_database()
    with ServerProcess(corral.home, database_url=environ.get("CORRAL_DATABASE_URL")) as server:
        yield server, environ


def test_it_works_beside_a_running_server(corral: Any, running: tuple[ServerProcess, dict[str, str]]) -> None:
    server, environ = running
    assert create(corral, "ada@example.org", environ=environ).status == 0
    client = server.sign_in("ada@example.org", PASSWORD)
    assert client.get("/auth/me").status_code == 200
    new = "another rather long phrase"
    reset = corral(
        "user", "reset-password", "ada@example.org", "--password-file", "-", stdin=new + "\n", environ=environ
    )
    assert reset.status == 0, reset
    with pytest.raises(httpx2.HTTPStatusError):
        server.sign_in("ada@example.org", PASSWORD)
    ada = server.sign_in("ada@example.org", new)
    admin = server.sign_in()
    events = admin.get("/events?types=user.created").json()["items"]
    made = [event["actor"] for event in events if event["data"]["how"] == "admin"]
    assert made == [{"type": "system", "id": operator_name()}], events
    assert corral("user", "deactivate", "ada@example.org", environ=environ).status == 0
    wait_until_refused(ada)


@pytest.mark.one_engine
def test_it_obeys_what_admins_set(corral: Any, running: tuple[ServerProcess, dict[str, str]]) -> None:
    server, environ = running
    admin = server.sign_in()
    assert admin.put("/settings/password/min_length", json={"value": len(PASSWORD) + 1}).status_code == 200
    refused = create(corral, "short@example.org", environ=environ)
    assert refused.status == 1, refused
    assert f"at least {len(PASSWORD) + 1} characters" in refused.err
    assert admin.post("/settings/password/min_length/reset").status_code == 200
    assert create(corral, "short@example.org", environ=environ).status == 0


def test_ways_back_in_beside_a_running_server(corral: Any, running: tuple[ServerProcess, dict[str, str]]) -> None:
    server, environ = running
    assert create(corral, "ada@example.org", environ=environ).status == 0
    ada = server.sign_in("ada@example.org", PASSWORD)
    app = AuthenticatorApp(ada.post("/auth/mfa/setup").json()["secret"])
    ada.post("/auth/mfa/verify", json={"code": app.code()}).raise_for_status()
    given = {"email": "ada@example.org", "password": PASSWORD}
    assert ada.post("/auth/login", json=given).json()["mfa_required"] is True
    lost = corral("user", "reset-mfa", "ada@example.org", environ=environ)
    assert (lost.status, "was removed" in lost.out) == (0, True), lost
    wait_until_refused(ada)
    again = server.sign_in("ada@example.org", PASSWORD)
    assert again.get("/auth/me").json()["mfa_enabled"] is False
    for _ in range(5):
        again.post("/auth/login", json={**given, "password": "not the phrase of hers"})
    locked = again.post("/auth/login", json=given)
    assert (locked.status_code, locked.json()["code"]) == (429, "account_locked"), locked.text
    freed = corral("user", "unlock", "ada@example.org", environ=environ)
    assert (freed.status, "Unlocked" in freed.out) == (0, True), freed
    assert again.post("/auth/login", json=given).status_code == 200
    assert corral("user", "deactivate", "ada@example.org", environ=environ).status == 0
    gone = corral("user", "purge", "ada@example.org", stdin="ada@example.org\n", environ=environ)
    assert gone.status == 0, gone
    assert again.post("/auth/login", json=given).status_code == 401
    assert corral("user", "show", "ada@example.org", environ=environ).status == 1


def wait_until_refused(client: httpx2.Client) -> None:
    """Another process reads rights again within a second."""
    until = time.monotonic() + 60
    while client.get("/auth/me").status_code != 401:
        assert time.monotonic() < until
        time.sleep(0.1)
