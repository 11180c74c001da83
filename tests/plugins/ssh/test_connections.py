"""Connections: fields, credentials, host keys, filters, rules of commands, cancellation and hostile machines."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import pytest_asyncio
from tests.plugins.ssh.conftest import PASSWORD, Fleet, Machine, _Gate, _Shell
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.errors import Forbidden
from corral.testing.kit import Client, Kit
from corral_plugins.secrets.service.redactor_values import RedactorValues
from corral_plugins.ssh.jobs import reap_executions, sweep_executions
from corral_plugins.ssh.service import session
from corral_plugins.ssh.service.command_rules import check_command, quote_argv
from corral_plugins.ssh.service.connections import SshConnections

BASE = {"name": "one", "hostname": "10.1.2.3", "username": "deploy"}


@pytest.mark.parametrize(
    ("command", "rules", "allows"),
    [
        ("rm x", {"denied": ["rm *"]}, False),
        ("ls;  rm   x", {"denied": ["rm *"]}, False),
        ("ls && rm x || true", {"denied": ["rm *"]}, False),
        ("ls\nrm x", {"denied": ["rm *"]}, False),
        ("lsrm x", {"denied": ["rm *"]}, True),
        ("uptime", {"allowed": ["uptime", "df *"]}, True),
        ("uptime | df -h", {"allowed": ["uptime", "df *"]}, True),
        ("uptime; id", {"allowed": ["uptime"]}, False),
        ("df $(id)", {"allowed": ["df *"]}, False),
        ("df `id`", {"allowed": ["df *"]}, False),
        ("df > /etc/x", {"allowed": ["df *"]}, False),
        ("df -h", {"allowed": ["df *"], "denied": ["df -h"]}, False),
    ],
)
def test_rules_of_commands(command: str, rules: dict[str, Any], allows: bool) -> None:
    both = {"allowed": [], "denied": [], **rules}
    if allows:
        check_command(command, **both)
    else:
        with pytest.raises(Forbidden):
            check_command(command, **both)


def test_argv_is_quoted() -> None:
    assert quote_argv(["echo", "it's", "$HOME; id"]) == "echo 'it'\"'\"'s' '$HOME; id'"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_admin(make_shared_kit: Callable[..., Any]) -> Client:
    """An admin for the tests in which every request is refused."""
    kit: Kit = await make_shared_kit(plugins=("secrets", "ssh"))
    return await kit.as_user("admin")


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("fields", "pointer", "code"),
    [
        ({"host_key_policy": "strict"}, "/host_key", "required"),
        ({"host_key": "ssh-ed25519 AAAA"}, "/host_key", "not_allowed"),
        ({"host_key_policy": "strict", "host_key": "ssh-ed25519 AAAA"}, "/host_key", "invalid_value"),
        ({"password": "x"}, "/password", "not_allowed"),
        ({"auth_method": "password", "private_key": "x"}, "/private_key", "not_allowed"),
        ({"private_key": "nothing"}, "/private_key", "invalid_value"),
        ({"hostname": "127.0.0.1"}, "/hostname", "egress.address"),
        ({"hostname": "169.254.169.254"}, "/hostname", "egress.address"),
        ({"port": 25, "hostname": "bad host"}, "/hostname", "egress.address"),
    ],
)
@on_the_loop_of_the_module
async def test_refused_fields(shared_admin: Client, fields: dict[str, Any], pointer: str, code: str) -> None:
    answer = await shared_admin.post("/ssh-connections", {**BASE, **fields})
    assert answer.status == 422, answer
    assert [(each["pointer"], each["code"]) for each in answer.json()["errors"]] == [(pointer, code)]


@pytest.mark.one_engine
@pytest.mark.filterwarnings("ignore:.*bcrypt.kdf:UserWarning")  # few rounds, because the key is that of a test
async def test_weak_and_locked_keys_are_refused(fleet: Fleet) -> None:
    weak = asyncssh.generate_private_key("ssh-rsa", key_size=1024).export_private_key().decode()
    locked = asyncssh.generate_private_key("ssh-ed25519").export_private_key(passphrase="right", rounds=1).decode()
    for fields, pointer in (
        ({"private_key": weak}, "/private_key"),
        ({"private_key": locked}, "/passphrase"),
        ({"private_key": locked, "passphrase": "wrong"}, "/passphrase"),
    ):
        answer = await fleet.admin.post("/ssh-connections", {**BASE, **fields})
        assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, pointer), answer


async def test_credentials_live_and_die_with_their_connection(fleet: Fleet) -> None:
    made = await fleet.create()
    stored = (await fleet.admin.get("/secrets")).json()["items"]
    assert [(each["id"], each["references"][0]["kind"]) for each in stored] == [
        (made["secret_id"], "connection.credential")
    ]
    masked = await fleet.admin.put(f"/ssh-connections/{made['id']}", {"password": "********"})
    assert (masked.status, masked.json()["code"]) == (422, "masked_value_submitted")
    secret = (await fleet.admin.post("/secrets", {"name": "SHARED", "value": PASSWORD})).json()
    changed = (await fleet.admin.put(f"/ssh-connections/{made['id']}", {"secret_id": secret["id"]})).json()
    assert (changed["secret_id"], changed["has_credential"]) == (secret["id"], True)
    assert [each["name"] for each in (await fleet.admin.get("/secrets")).json()["items"]] == ["SHARED"]
    assert (await fleet.admin.delete(f"/ssh-connections/{made['id']}")).status == 204
    assert [each["name"] for each in (await fleet.admin.get("/secrets")).json()["items"]] == ["SHARED"]
    unknown = await fleet.admin.post("/ssh-connections", {**BASE, "secret_id": made["id"]})
    assert (unknown.status, unknown.json()["code"]) == (422, "unknown_reference")


@pytest.mark.one_engine
async def test_a_credential_in_the_words_of_a_machine_is_redacted(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat(gate: Any, username: str, password: str) -> bool:
        raise asyncssh.DisconnectError(asyncssh.DISC_BY_APPLICATION, f"{password} is wrong")

    monkeypatch.setattr(_Gate, "validate_password", repeat)
    connection = await fleet.trusted()
    await fleet.kit.service(RedactorValues).refresh()  # at the latest after 2 s, without being told
    for path, body in (("test", None), ("execute", {"command": "true"})):
        answer = await fleet.post(f"{connection}/{path}", body)
        assert (answer.status, answer.code, PASSWORD in answer.body.decode()) == (502, "ssh_connect_failed", False)
        assert " is wrong" in answer.body.decode()
    shown = await fleet.admin.get(f"/ssh-connections/{connection}")
    assert PASSWORD not in shown.body.decode() + json.dumps(await fleet.executions(connection))


@pytest.mark.one_engine
async def test_a_command_may_end_without_reading_its_input(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_at_once(shell: Any) -> None:
        shell._channel.write(b"done\n")
        shell._channel.exit(0)

    monkeypatch.setattr(_Shell, "session_started", end_at_once)
    connection = await fleet.trusted()
    answer = await fleet.post(f"{connection}/execute", {"command": "true", "stdin": "not read"})
    assert answer.status == 200, answer
    assert (answer.json()["exit_code"], answer.json()["stdout"]) == (0, "done\n")


@pytest.mark.one_engine
async def test_another_place_has_another_host_key(fleet: Fleet, machine: Machine) -> None:
    made = await fleet.create(tags=["lab"])
    none_yet = await fleet.admin.post("/ssh-connections", {**BASE, "name": "Other"})
    assert none_yet.json()["has_credential"] is False
    await fleet.post(f"{made['id']}/test")
    await fleet.post(f"{made['id']}/host-key/accept", {"fingerprint": machine.fingerprint})
    assert (await fleet.post(f"{made['id']}/test")).status == 200
    listed = (await fleet.admin.get("/ssh-connections?status=ok&tag=lab")).json()["items"]
    assert [each["id"] for each in listed] == [made["id"]]
    moved = (await fleet.admin.put(f"/ssh-connections/{made['id']}", {"port": machine.port + 1})).json()
    assert (moved["host_key_state"], moved["host_key_fingerprint"]) == ("unknown", None)
    taken = await fleet.admin.put(f"/ssh-connections/{made['id']}", {"name": "OTHER"})
    assert (taken.status, taken.json()["code"]) == (409, "duplicate")


async def test_a_key_that_was_accepted_or_left_behind_meanwhile_blocks_nothing(fleet: Fleet, machine: Machine) -> None:
    """Two tests see the first key, and a person accepts it before the second one has recorded it."""
    made = await fleet.create()
    work, connections = fleet.kit.kernel.database.work, fleet.kit.service(SshConnections)
    before = await work(lambda: connections.find(made["id"]), read=True)
    await fleet.post(f"{made['id']}/test")
    await fleet.post(f"{made['id']}/host-key/accept", {"fingerprint": machine.fingerprint})
    late = await work(lambda: connections.record_seen_key(before, machine.key_line))
    assert late.code == "invalid_state"
    assert (await fleet.post(f"{made['id']}/test")).status == 200
    await fleet.admin.put(f"/ssh-connections/{made['id']}", {"port": machine.port + 1})
    late = await work(lambda: connections.record_seen_key(before, machine.key_line))
    assert late.code == "invalid_state"
    assert (await fleet.admin.get(f"/ssh-connections/{made['id']}")).json()["host_key_state"] == "unknown"


async def test_a_command_is_cancelled_here_and_from_another_process(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    running = asyncio.ensure_future(fleet.run(connection, "echo begun; sleep 600"))
    row = await _first(fleet, connection)
    assert (await fleet.admin.delete(f"/ssh-connections/{connection}")).json()["code"] == "in_use"
    cancelled = await fleet.post(f"{connection}/executions/{row['id']}/cancel")
    assert (cancelled.status, cancelled.json()["status"]) == (200, "cancelled")
    assert (await running).json()["current_status"] == "cancelled"
    await asyncio.gather(*machine.tasks)
    assert machine.living() == []
    assert (await fleet.executions(connection))[0]["status"] == "cancelled"
    assert await fleet.finished_on() == ["machine-1"]
    again = await fleet.post(f"{connection}/executions/{row['id']}/cancel")
    assert (again.status, again.json()["code"]) == (409, "invalid_state")


@pytest.mark.one_engine
async def test_a_command_that_is_cancelled_while_it_starts_is_stopped(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, started = await fleet.trusted(), asyncio.Event()
    create = asyncssh.SSHClientConnection.create_process

    async def create_slowly(self: Any, *arguments: Any, **options: Any) -> Any:
        process = await create(self, *arguments, **options)
        started.set()
        await asyncio.sleep(0.3)  # as if the machine's answer took this long
        return process

    monkeypatch.setattr(asyncssh.SSHClientConnection, "create_process", create_slowly)
    running = asyncio.ensure_future(fleet.run(connection, "sleep 600"))
    await started.wait()
    row = await _first(fleet, connection)
    await fleet.post(f"{connection}/executions/{row['id']}/cancel")
    assert (await running).json()["current_status"] == "cancelled"
    async with asyncio.timeout(20):
        await asyncio.gather(*machine.tasks)
    assert machine.living() == []


@pytest.mark.one_engine
async def test_a_cancelled_command_that_ignores_term_is_killed(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The process notices after two seconds that the command was cancelled; this must not end the wait for KILL."""
    monkeypatch.setattr(session, "STOP_SECONDS", 3.0)
    connection = await fleet.trusted()
    command = f"trap '' TERM; touch {tmp_path}/trapped; sleep 600"
    running = asyncio.ensure_future(fleet.run(connection, command))
    row = await _first(fleet, connection)
    for _ in range(2000):
        if (tmp_path / "trapped").exists():
            break
        await asyncio.sleep(0.02)
    await fleet.post(f"{connection}/executions/{row['id']}/cancel")
    assert (await running).json()["current_status"] == "cancelled"
    async with asyncio.timeout(60):
        await asyncio.gather(*machine.tasks)
    assert machine.living() == []


async def test_commands_of_dead_processes_are_reaped_and_old_ones_removed(fleet: Fleet, machine: Machine) -> None:
    from corral_plugins.ssh.models import Execution
    from corral_plugins.ssh.service.executions import SshExecutions

    connection = await fleet.trusted()
    await fleet.run(connection, "true")
    work, executions = fleet.kit.kernel.database.work, fleet.kit.service(SshExecutions)
    await work(lambda: Execution.update(status="running", alive_until=clock.now(-1)).execute())
    await reap_executions(work, executions)
    assert [each["status"] for each in await fleet.executions(connection)] == ["interrupted"]
    assert await fleet.finished_on() == ["machine-1", "machine-1"]
    told = [json.loads(event.data)["status"] for event in await fleet.kit.events() if event.type == "ssh.executed"]
    assert told == ["completed", "interrupted"]
    clock.travel(91 * 86_400)
    from corral.plugin import Settings

    await sweep_executions(work, fleet.kit.service(Settings))
    assert await work(lambda: Execution.select().count(), read=True) == 0


async def test_a_command_whose_process_tells_that_it_is_alive_in_the_meantime_is_not_reaped(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral_plugins.ssh.models import Execution
    from corral_plugins.ssh.service.executions import SshExecutions

    connection = await fleet.trusted()
    await fleet.run(connection, "true")
    work, executions, update = fleet.kit.kernel.database.work, fleet.kit.service(SshExecutions), Execution.update
    await work(lambda: Execution.update(status="running", alive_until=clock.now(-1)).execute())

    def update_after_it_was_renewed(*arguments: Any, **named: Any) -> Any:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(Execution, "update", update)
            (row,) = Execution.select()
            assert executions.renew(row.id)
        return update(*arguments, **named)

    monkeypatch.setattr(Execution, "update", update_after_it_was_renewed)
    await reap_executions(work, executions)
    assert [each["status"] for each in await fleet.executions(connection)] == ["running"]
    told = [json.loads(event.data)["status"] for event in await fleet.kit.events() if event.type == "ssh.executed"]
    assert told == ["completed"]


@pytest.mark.one_engine
async def test_banner_floods_and_tarpits_are_bounded(fleet: Fleet) -> None:
    await fleet.admin.put("/settings/ssh/connect_timeout_seconds", {"value": 1})

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(64):
            writer.write(b"welcome\r\n" * 1024)
            await writer.drain()

    async def tarpit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(600):
            writer.write(b"wait\r\n")
            await writer.drain()
            await asyncio.sleep(0.1)

    for serve, expected in ((flood, (502, "ssh_connect_failed")), (tarpit, (504, "upstream_timeout"))):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        made = await fleet.create(port=server.sockets[0].getsockname()[1])
        answer = await asyncio.wait_for(fleet.post(f"{made['id']}/test"), 60)
        assert (answer.status, answer.json()["code"]) == expected
        view = (await fleet.admin.get(f"/ssh-connections/{made['id']}")).json()
        assert (view["status"], view["last_error"]) == ("failing", answer.json()["detail"])
        server.close()


@pytest.mark.one_engine
async def test_failures_to_connect_open_the_breaker(fleet: Fleet, machine: Machine) -> None:
    connection = await fleet.trusted()
    name = f"ssh:{connection}"
    await fleet.admin.post(
        "/circuit-breakers", {"name": name, "minimum_calls": 2, "window_size": 2, "failure_rate_threshold": 100}
    )
    for _ in range(3):
        await fleet.run(connection, "exit 1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        line = machine.key_line
        await fleet.admin.put(f"/ssh-connections/{connection}", {"port": closed.getsockname()[1], "host_key": line})
        port, answers = closed.getsockname()[1], [(await fleet.post(f"{connection}/test")).json() for _ in range(4)]
    assert answers[0]["detail"] == f"127.0.0.1:{port} cannot be reached: Connection refused."
    codes = [answer["code"] for answer in answers]
    assert codes == ["ssh_connect_failed", "ssh_connect_failed", "circuit_open", "circuit_open"]


@pytest.mark.one_engine
async def test_members_have_no_part_in_it(fleet: Fleet) -> None:
    connection = await fleet.trusted()
    member = await fleet.kit.as_user("member")
    for path in ("", f"/{connection}", f"/{connection}/executions"):
        assert (await member.get(f"/ssh-connections{path}")).status == 403
    assert (await member.post(f"/ssh-connections/{connection}/execute", {"command": "id"})).status == 403


async def _first(fleet: Fleet, connection: str) -> Any:
    """The first command that runs."""
    for _ in range(2000):
        if rows := await fleet.executions(connection):
            return rows[0]
        await asyncio.sleep(0.02)
    raise AssertionError("no command was started")
