"""The criteria of the contract page `ssh`, against SSH servers on this computer."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest
from tests.limits import within
from tests.plugins.ssh.conftest import PASSWORD, USER, Fleet, Machine

from corral.testing.server import free_port
from corral_plugins.ssh.service.runner import SshRunner

pytestmark = pytest.mark.one_engine


async def test_ssh_1_the_first_test_shows_the_fingerprint_of_ssh_keygen(
    fleet: Fleet, machine: Machine, tmp_path: Path
) -> None:
    made = await fleet.create()
    first = await fleet.post(f"{made['id']}/test")
    assert (first.status, first.json()["code"]) == (409, "host_key_unverified")
    shown = first.json()["fingerprint_sha256"]
    assert shown == machine.fingerprint
    (tmp_path / "key.pub").write_text(machine.key_line)
    if keygen := shutil.which("ssh-keygen"):
        command = [keygen, "-lf", str(tmp_path / "key.pub")]
        printed = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert printed.split()[1] == shown
    assert machine.logins == []  # no credential was sent
    wrong = await fleet.post(f"{made['id']}/host-key/accept", {"fingerprint": "SHA256:other"})
    assert (wrong.status, wrong.json()["code"]) == (409, "invalid_state")
    accepted = await fleet.post(f"{made['id']}/host-key/accept", {"fingerprint": shown})
    assert accepted.json()["host_key_state"] == "trusted", accepted
    second = await fleet.post(f"{made['id']}/test")
    assert second.status == 200, second
    assert {key: second.json()[key] for key in ("ok", "fingerprint", "auth")} == {
        "ok": True,
        "fingerprint": shown,
        "auth": "ok",
    }
    assert machine.logins == [USER]


async def test_ssh_2_a_new_host_key_blocks_everything_and_nothing_is_sent(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    assert (await fleet.post(f"{connection}/test")).status == 200
    old, logins = machine.fingerprint, list(machine.logins)
    await machine.renew_key()
    for path, body in (("test", None), ("execute", {"command": "id"}), ("test", None)):
        refused = await fleet.post(f"{connection}/{path}", body)
        assert (refused.status, refused.json()["code"]) == (409, "host_key_mismatch"), refused
        assert refused.json()["fingerprint_sha256"] == machine.fingerprint
    assert machine.logins == logins
    events = [event for event in await fleet.kit.events() if event.type in ("ssh.host_key_mismatch", "system.alert")]
    [told] = [json.loads(event.data) for event in events if event.type == "ssh.host_key_mismatch"]
    assert (told["connection_id"], told["old"], told["new"]) == (connection, old, machine.fingerprint)
    assert [json.loads(event.data)["severity"] for event in events if event.type == "system.alert"] == ["critical"]
    view = (await fleet.admin.get(f"/ssh-connections/{connection}")).json()
    assert (view["host_key_state"], view["status"]) == ("mismatch", "blocked")
    await fleet.post(f"{connection}/host-key/accept", {"fingerprint": machine.fingerprint})
    assert (await fleet.run(connection, "echo back")).json()["stdout"] == "back\n"


async def test_ssh_3_a_command_is_ended_with_its_process_group(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    async with within(8):
        answer = await fleet.run(connection, "sleep 600 & sleep 600", timeout_seconds=2)
    assert answer.status == 200, answer
    assert (answer.json()["timed_out"], answer.json()["exit_code"]) == (True, None)
    assert not [each for each in _children(machine) if each.is_running()]
    (row,) = await fleet.executions(connection)
    assert row["status"] == "timed_out"
    stubborn = await fleet.run(connection, "trap '' TERM; sleep 600; sleep 600; sleep 600", timeout_seconds=1)
    assert stubborn.json()["timed_out"] is True
    assert not [each for each in _children(machine) if each.is_running()]


async def test_ssh_4_endless_output_is_cut_and_the_memory_stays(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    zeros = await fleet.run(connection, "head -c 900000 /dev/zero")
    assert (zeros.status, zeros.json()["stdout"]) == (200, "\N{REPLACEMENT CHARACTER}" * 900_000), zeros.status
    before = psutil.Process().memory_info().rss
    answer = await fleet.run(connection, "yes")
    assert answer.status == 200, answer
    body = answer.json()
    assert (body["truncated"], body["timed_out"], len(body["stdout"])) == (True, False, 1_048_576)
    assert psutil.Process().memory_info().rss - before <= 16 * 1024 * 1024  # the machine is in this process too
    row = (await fleet.executions(connection))[0]
    stored = (await fleet.admin.get(f"/ssh-connections/{connection}/executions/{row['id']}")).json()
    assert (len(stored["stdout"]), row["truncated"]) == (65_536, True)
    assert row["bytes_out"] >= 1_048_576


async def test_ssh_5_more_commands_than_allowed_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    connection, over = await fleet.trusted(max_concurrency=2), tmp_path / "over"
    command = f"until test -e {over}; do sleep 0.1; done"
    running = [asyncio.ensure_future(fleet.run(connection, command)) for _ in range(3)]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    over.touch()
    answers = await asyncio.gather(*running)
    assert sorted(answer.status for answer in answers) == [200, 200, 429]
    assert next(each.json()["code"] for each in answers if each.status == 429) == "concurrency_limit"


async def test_ssh_6_exit_codes_refused_logins_and_dead_hosts(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    assert (await fleet.run(connection, "exit 3")).json()["exit_code"] == 3
    wrong = await fleet.trusted(password="not-the-password")
    refused = await fleet.post(f"{wrong}/test")
    assert (refused.status, refused.json()["code"]) == (502, "ssh_auth_failed")
    with socket.socket() as silent:  # accepts and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        dead = await fleet.create(port=silent.getsockname()[1])
        await fleet.admin.put("/settings/ssh/connect_timeout_seconds", {"value": 1})
        async with within(2.5):
            answer = await fleet.post(f"{dead['id']}/test")
        assert (answer.status, answer.json()["code"]) == (504, "upstream_timeout")
    closed = await fleet.create(port=free_port())
    answer = await fleet.post(f"{closed['id']}/test")
    assert (answer.status, answer.json()["code"]) == (502, "ssh_connect_failed")


async def test_ssh_7_denied_commands_are_refused_and_on_record(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted(denied_commands=["rm *"])
    refused = await fleet.run(connection, "echo a; rm -rf x")
    assert (refused.status, refused.json()["code"]) == (403, "command_denied")
    assert machine.connections == 0
    rows = (await fleet.admin.get("/admin/audit?action=ssh.command.start")).json()["items"]
    assert [(row["outcome"], row["code"], row["details"]["command"]) for row in rows] == [
        ("denied", "command_denied", "echo a; rm -rf x")
    ]


async def test_ssh_7_rules_that_change_while_a_command_is_checked_hold(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that was checked by the rules of before does not start."""
    connection, runner = await fleet.trusted(), fleet.kit.service(SshRunner)
    check = runner._check_rules

    async def changed(*arguments: Any) -> None:
        await check(*arguments)
        answer = await fleet.admin.put(f"/ssh-connections/{connection}", {"denied_commands": ["rm *"]})
        assert answer.status == 200, answer

    monkeypatch.setattr(runner, "_check_rules", changed)
    refused = await fleet.run(connection, "rm -rf x")
    assert (refused.status, refused.json()["detail"]) == (
        409,
        "The connection was changed by another request at the same time; repeat the request.",
    )
    assert (await fleet.executions(connection), machine.connections) == ([], 0)


@pytest.mark.filterwarnings("ignore:.*bcrypt.kdf:UserWarning")  # few rounds, because the key is that of a test
async def test_ssh_8_no_credential_is_shown_anywhere(fleet: Fleet, machine: Machine, caplog: Any) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    machine.authorized.add(" ".join(key.export_public_key().decode().split()[:2]))
    locked = key.export_private_key(passphrase="a-long-passphrase", rounds=1).decode()
    by_key = await fleet.trusted(private_key=locked, passphrase="a-long-passphrase")
    by_password = await fleet.trusted()
    shown = []
    for connection in (by_key, by_password):
        shown += [
            (await fleet.post(f"{connection}/test")).body,
            (await fleet.run(connection, f"echo {PASSWORD} a-long-passphrase; echo {PASSWORD} >&2")).body,
            (await fleet.admin.get(f"/ssh-connections/{connection}")).body,
            (await fleet.admin.get(f"/ssh-connections/{connection}/executions")).body,
        ]
    shown += [(await fleet.admin.get(path)).body for path in ("/ssh-connections", "/admin/audit?limit=200", "/secrets")]
    shown.append(caplog.text.encode())
    shown.append(repr([event.data for event in await fleet.kit.events()]).encode())
    middle = locked.splitlines()[2]
    for text in (PASSWORD, "a-long-passphrase", middle):
        assert not [each for each in shown if text.encode() in each], text


async def test_against_the_server_of_openssh(fleet: Fleet, sshd: Any) -> None:
    line = " ".join(sshd["host_key"].export_public_key().decode().split()[:2])
    made = await fleet.create(
        port=sshd["port"],
        username=getpass.getuser(),
        private_key=sshd["private_key"],
        host_key_policy="strict",
        host_key=line,
    )
    connection = made["id"]
    assert (await fleet.post(f"{connection}/test")).status == 200
    words = {"argv": ["sh", "-c", 'echo "$GREETING $1"; cat', "-", "it's $HOME"], "env": {"GREETING": "hello"}}
    answer = (await fleet.post(f"{connection}/execute", {**words, "stdin": "from stdin"})).json()
    assert (answer["exit_code"], answer["stdout"]) == (0, "hello it's $HOME\nfrom stdin")
    mark = f"600.{sshd['port']}"
    late = await fleet.run(connection, f"sleep {mark} & sleep {mark}", timeout_seconds=1)
    assert late.json()["timed_out"] is True
    assert not [each for each in psutil.process_iter(["cmdline"]) if mark in (each.info["cmdline"] or [])]
    cut = (await fleet.run(connection, "yes")).json()
    assert (cut["truncated"], len(cut["stdout"])) == (True, 1_048_576)


def _children(machine: Machine) -> list[psutil.Process]:
    """The living processes of the sessions that commands ran in."""
    groups = {each.pid for each in machine.processes}
    found = []
    for each in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(each.pid) in groups and each.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(each)
        except ProcessLookupError:
            continue
    return found
