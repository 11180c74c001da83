"""What the page on security promises, line by line, and line 7 of the page on conventions.

Waiting: exports (2), with the plugin that makes them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.kernel.cli.warm import warm
from tests.limits import Stopwatch
from tests.plugins.realtime.conftest import ear
from tests.plugins.security.conftest import AWAY, HOME, PLUGINS, TRUSTING, From, make_key

from corral.auth.principal import ANY_CALLER, PUBLIC
from corral.plugin import RateLimits
from corral.testing.database_servers import ValkeyServer
from corral.testing.kit import PASSWORD, Client, Kit
from corral.testing.server import ServerProcess, serving
from corral_plugins.security.service.api_keys import LastUseRecorder
from corral_plugins.security.service.ip_rules import IpGateUpdater
from corral_plugins.security.shapes import PasswordPolicyPatch, PolicyPatch

ID = "01a216b4-06ab-770c-a9ce-e8400c03429a"
WITHIN = 2.0


def filled(path: str) -> str:
    """A path with something for each name."""
    for name in ("id", "worker_id", "version", "key"):
        path = path.replace("{" + name + "}", ID)
    while "{" in path:
        start, _, rest = path.partition("{")
        path = start + ID + rest.partition("}")[2]
    return path


@pytest.mark.one_engine
async def test_security_1_a_key_that_reads_is_refused_every_write(make_kit: Callable[..., Any]) -> None:
    """Over all operations of all plugins that its owner, an admin, may do."""
    kit: Kit = await make_kit()
    admin = await kit.as_user("admin")
    key, _ = await make_key(admin, scopes=["*.read"])
    held = (await admin.get("/auth/me")).json()["permissions"]
    reads, writes = 0, 0
    for endpoint in kit.application.endpoints:
        route, needs = endpoint.route, set(endpoint.route.needs)
        if route.plugin == "emitter" or PUBLIC in needs or ANY_CALLER in needs:
            continue
        if not (needs & set(held) or "signed_in" in needs):  # machines' own
            continue
        if route.method == "GET" and (needs & {name for name in held if name.endswith(".read")}):
            if "{" not in route.path and not route.path.endswith(("/stream", "/export")):
                answer = await key.get(route.path)
                assert (answer.status, answer.code) != (403, "insufficient_scope"), route.label
                assert answer.status == (await admin.get(route.path)).status, route.label
                reads += 1
        elif route.method != "GET" and not any(name.endswith(".read") for name in needs):
            answer = await key.request(route.method, filled(route.path), {})
            assert (answer.status, answer.code) == (403, "insufficient_scope"), (route.label, answer)
            writes += 1
    assert reads > 15
    assert writes > 40
    print(f"{reads} reads as the owner, {writes} writes refused")


async def test_security_2_the_text_of_a_key_is_nowhere(
    make_kit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    kit: Kit = await make_kit(plugins=PLUGINS, config=TRUSTING)
    alice = await kit.as_user("member")
    keyed = {"headers": {"idempotency-key": "once"}}
    first = await alice.post("/security/api-keys", {"name": "script", "scopes": ["*"]}, **keyed)
    again = await alice.post("/security/api-keys", {"name": "script", "scopes": ["*"]}, **keyed)
    assert again.headers["idempotency-replayed"] == "true"
    text = first.json()["key"]
    assert again.json()["key"] == text
    key = From(alice, HOME, key=text)
    for path in ("/tasks", "/auth/me", "/security/api-keys", "/nothing", "/admin/users"):
        await key.get(path)
    assert (await key.post("/auth/ws-ticket")).status == 200
    await From(alice, key=text[:-1] + "!").get("/tasks")
    await kit.kernel.container.get(LastUseRecorder).write_pending()
    rotated = (await alice.post(f"/security/api-keys/{first.json()['id']}/rotate", {"overlap_seconds": 60})).json()
    needles = [shown[13:43] for shown in (text, rotated["key"])]
    dump = await kit.kernel.database.work(lambda: _everything(kit), read=True)
    assert "security_api_keys" in dump
    assert "api_key.created" in str([event.type for event in await kit.events()])
    texts = {"rows": dump, "log": caplog.text, **_files(tmp_path)}
    for needle in needles:
        assert [where for where, found in texts.items() if needle in found] == []


def _everything(kit: Kit) -> str:
    """Every row of every table, as text."""
    engine = kit.kernel.database.engine
    tables = engine.get_tables()
    return "\n".join(f"{table} {row}" for table in tables for row in engine.execute_sql(f'SELECT * FROM "{table}"'))


def _files(folder: Path) -> dict[str, str]:
    """Every file of the installation: the database with its write-ahead log, keys, blobs."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.name: file.read_bytes().decode("latin1") for file in files}


class Pair:
    """Two server processes on one installation, each with its own address."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self.servers, self.clients = servers, [server.client() for server in servers]
        self.admin = servers[0].sign_in()
        self.watch = Stopwatch()

    def ask(self, key: str) -> set[int]:
        """What the processes answer."""
        return {client.get("/tasks", headers={"X-API-Key": key}).status_code for client in self.clients}

    def last_seen(self, ended: dict[str, float], *, quiet: float = 3.0) -> dict[str, tuple[float, set[int]]]:
        """How long after its end each key last worked in any process, and what it gets since.

        `ended` says when each of the keys was ended. They are asked until none of them has worked for a while.
        """
        last = dict(ended)
        while True:
            found = {key: self.ask(key) for key in ended}
            now = self.watch.seconds
            for key, statuses in found.items():
                if 200 in statuses:
                    last[key] = now
                    assert now - ended[key] < 30
            if now - max(last.values()) > quiet:
                return {key: (last[key] - then, found[key]) for key, then in ended.items()}
            time.sleep(0.02 if now - max(last.values()) < WITHIN else 0.1)

    def member(self, number: int) -> tuple[str, httpx2.Client]:
        """A new member and their client."""
        email = f"member{number}@example.org"
        body = {"email": email, "full_name": "M", "password": PASSWORD, "role": "member"}
        made = self.admin.post("/admin/users", json=body)
        assert made.status_code == 201, made.text
        return str(made.json()["id"]), self.servers[0].sign_in(email, PASSWORD)


@pytest.fixture
def pair(tmp_path: Path, database_url: str) -> Iterator[Pair]:
    key = base64.b64encode(os.urandom(32)).decode()
    environ = {"CORRAL_MASTER_KEY": f"v1:{key}", "CORRAL_DATA_DIR": str(tmp_path / "data")}
    with contextlib.ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            server = ServerProcess(tmp_path / name, database_url=database_url, environ=environ)
            if name == "a":
                _migrate(server)
            servers.append(stack.enter_context(server))
        pair = Pair(servers)
        stack.enter_context(pair.watch)
        yield pair


def _migrate(server: ServerProcess) -> None:
    done = warm().run(("migrate",), cwd=server.folder, environ=server.environ, stdin="")
    assert done.returncode == 0, done


def test_security_3_what_ends_a_key_ends_it_in_every_process(pair: Pair) -> None:
    ends: dict[str, Callable[[str, httpx2.Client, dict[str, Any]], httpx2.Response]] = {
        "deleted": lambda user, owner, key: owner.delete(f"/security/api-keys/{key['id']}"),
        "disabled": lambda user, owner, key: pair.admin.patch(f"/admin/users/{user}", json={"is_active": False}),
        "demoted": lambda user, owner, key: pair.admin.patch(f"/admin/users/{user}", json={"role": "auditor"}),
    }
    cases = []
    for number, how in enumerate(ends):
        user, owner = pair.member(number)
        made = owner.post("/security/api-keys", json={"name": how, "scopes": ["*.read"]})
        assert made.status_code == 201, made.text
        key = made.json()
        cases.append((how, user, owner, key))
    ended = {}
    for how, user, owner, key in cases:
        assert pair.ask(key["key"]) == {200}
        answer = ends[how](user, owner, key)
        assert answer.status_code in (200, 204), answer.text
        ended[key["key"]] = pair.watch.seconds
    seen = pair.last_seen(ended)
    metrics = {}
    for how, _, _, key in cases:
        metrics[how], then = seen[key["key"]]
        assert then == {403 if how == "demoted" else 401}, how
    print("; ".join(f"{how}: {seconds:.2f} s" for how, seconds in metrics.items()))
    assert max(metrics.values()) < WITHIN


async def test_security_4_an_allow_list_without_its_author_is_refused(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=PLUGINS, config=TRUSTING)
    user = await kit.as_user("admin", "boss@example.org")
    admin = From(user, HOME)
    body = {"mode": "allowlist", "rules": [{"action": "allow", "cidr": "10.0.0.0/8"}]}
    refused = await admin.put("/security/ip-rules", body)
    assert (refused.status, refused.code, refused.json()["your_ip"]) == (409, "would_lock_out", HOME)
    assert (await admin.get("/security/ip-rules")).json()["mode"] == "off"
    assert (await admin.put("/security/ip-rules", {**body, "force": True})).status == 200
    await kit.kernel.container.get(IpGateUpdater).load_rules()
    assert (await admin.get("/security/ip-rules")).code == "ip_blocked"
    switched: Kit = await make_kit(plugins=PLUGINS, config={**TRUSTING, "ip_rules_disabled": True})
    back = From(await switched.sign_in("boss@example.org"), HOME)
    assert "ip_rules_disabled" in (await back.get("/security")).json()["warnings"]
    assert (await back.put("/security/ip-rules", {"mode": "off", "rules": []})).status == 200


def test_security_4_the_command_on_the_machine_turns_the_rules_off(tmp_path: Path) -> None:
    """Beside a running server, which follows."""
    (tmp_path / "a").mkdir()
    with ServerProcess(tmp_path / "a") as server, server.sign_in() as admin:
        body = {"mode": "allowlist", "rules": [{"action": "allow", "cidr": "10.0.0.0/8"}], "force": True}
        assert admin.put("/security/ip-rules", json=body).status_code == 200
        assert _until(lambda: admin.get("/security").status_code, 403) < WITHIN
        command = ("security", "ip-rules", "off")
        done = warm().run(command, cwd=tmp_path, environ=server.environ, stdin="")
        assert (done.returncode, "rules are off" in done.stdout) == (0, True), done.stderr
        assert _until(lambda: admin.get("/security").status_code, 200) < WITHIN + 1
        shown = admin.get("/security/ip-rules").json()
        assert (shown["mode"], len(shown["rules"])) == ("off", 1)
        rows = admin.get("/admin/audit?action=security.ip_rules.*&outcome=success").json()["items"]
        assert rows[0]["actor"]["type"] == "system"


def _until(status: Callable[[], int], wanted: int) -> float:
    with Stopwatch() as watch:
        while status() != wanted:
            assert watch.seconds < 20
            time.sleep(0.05)
    return watch.seconds


@pytest.fixture
async def live(make_kit: Callable[..., Any]) -> AsyncIterator[tuple[Kit, int]]:
    kit: Kit = await make_kit(plugins=PLUGINS, config=TRUSTING)
    async with serving(kit) as port:
        yield kit, port


async def test_security_5_a_block_closes_the_socket_and_refuses_the_refresh(live: tuple[Kit, int]) -> None:
    kit, port = live
    admin = From(await kit.as_user("admin"), HOME)
    away = From(kit.client, AWAY)
    await kit.as_user("member", "mallory@example.org")
    signed = (await away.post("/auth/login", {"email": "mallory@example.org", "password": PASSWORD})).json()
    there: dict[str, Any] = {"additional_headers": {"X-Forwarded-For": AWAY}}
    async with (
        ear(port, Client(kit.application.app, signed["access_token"]), **there) as socket,
        ear(port, admin, additional_headers={"X-Forwarded-For": HOME}) as own,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http,
    ):
        assert (await socket.ask("ping"))["type"] == "pong"
        headers = {"Authorization": f"Bearer {signed['access_token']}", "X-Forwarded-For": AWAY}
        async with http.stream("GET", "/api/v1/events/stream", headers=headers) as stream:
            assert stream.status_code == 200
            body = {"mode": "blocklist", "rules": [{"action": "block", "cidr": f"{AWAY}/32"}]}
            assert (await admin.put("/security/ip-rules", body)).status == 200
            with Stopwatch() as watch:
                ends = asyncio.create_task(_end(stream))
                assert await socket.closed(15) == 4403
                seconds = watch.seconds
                await asyncio.wait_for(ends, 60)
                streamed = watch.seconds
        print(f"socket closed after {seconds:.2f} s, stream after {streamed:.2f} s")
        assert max(seconds, streamed) < 5
        assert (await away.post("/auth/refresh", {"refresh_token": signed["refresh_token"]})).code == "ip_blocked"
        with pytest.raises(Exception, match="403"):
            async with ear(port, None, **there):
                raise AssertionError("a blocked client opened a socket")
        assert (await own.ask("ping"))["type"] == "pong"


async def _end(stream: Any) -> None:
    with contextlib.suppress(httpx2.HTTPError):
        async for _ in stream.aiter_bytes():
            continue


POLICY_BOUNDS = {
    "registration": ["closed", "shut"],
    "default_role": ["viewer", "admin"],
    "email_verification": [False, "maybe"],
    "require_mfa": [False, "x"],
    "require_mfa_roles": [["admin"], ["emperor"]],
    "access_ttl_seconds": [60, 59, 3601],
    "refresh_idle_seconds": [3600, 3599, 2_592_001],
    "refresh_absolute_seconds": [7_776_000, 3599, 7_776_001],
    "refresh_grace_seconds": [0, -1, 61],
    "lockout_threshold": [3, 2, 21],
    "lockout_window_seconds": [60, 59, 86_401],
    "lockout_seconds": [3600, 59, 3601],
    "step_up_seconds": [900, 59, 901],
    "max_sessions_per_user": [100, 0, 101],
    "api_keys_enabled": [True, None],
    "api_key_default_days": [365, 0, 366],
    "api_key_max_days": [1, 0, 366],
    "api_keys_per_user": [100, 0, 101],
}
PASSWORD_BOUNDS = {
    "min_length": [64, 7, 65],
    "breached_check": [True, "x"],
    "history": [24, -1, 25],
    "require_upper": [True, 2],
    "context_words": [["acme"], [""], ["x"] * 101],
    "require_lower": [True, "x"],
    "require_digit": [True, "x"],
    "require_symbol": [True, "x"],
    "max_age_days": [None, 0, 3651],
}


@pytest.mark.parametrize(
    ("path", "bounds", "patch"),
    [("/security", POLICY_BOUNDS, PolicyPatch), ("/security/password-policy", PASSWORD_BOUNDS, PasswordPolicyPatch)],
)
async def test_security_6_fields_out_of_bounds_are_422_and_store_nothing(
    kit: Kit, path: str, bounds: dict[str, list[Any]], patch: Any
) -> None:
    admin = await kit.as_user("admin")
    assert set(bounds) == set(patch.__struct_fields__)
    before = (await admin.get(path)).json()
    good, *_ = [name for name in bounds if name not in ("require_mfa", "email_verification")]
    for name, (fine, *wrong) in bounds.items():
        for value in wrong:
            other = good if name != good else "lockout_threshold" if path == "/security" else "history"
            answer = await admin.put(path, {other: bounds[other][0], name: value})
            assert answer.status == 422, (name, value)
            pointers = [item["pointer"] for item in answer.json()["errors"]]
            assert all(pointer.startswith(f"/{name}") for pointer in pointers), (name, value, pointers)
            assert pointers
        assert (await admin.put(path, {name: fine})).status == 200, (name, fine)
        assert (await admin.get(path)).json()[name] == fine
    unknown = await admin.put(path, {"max_length": 5, "ip_mode": "off"})
    assert [item["pointer"] for item in unknown.json()["errors"]] == ["/max_length", "/ip_mode"]
    assert (await admin.get(path)).json() != before


async def test_security_6_of_a_body_with_one_fault_nothing_is_stored(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    before = (await admin.get("/security")).json()
    refused = await admin.put("/security", {"step_up_seconds": 100, "lockout_threshold": 4, "lockout_seconds": 1})
    assert refused.status == 422
    assert (await admin.get("/security")).json() == before


async def test_security_7_of_two_admins_with_one_version_one_wins(kit: Kit) -> None:
    first, second = await kit.as_user("admin"), await kit.as_user("admin")
    for _ in range(5):
        shown = await first.get("/security/ip-rules")
        tag = shown.headers["etag"]
        bodies = [{"mode": "blocklist", "rules": [{"action": "block", "cidr": f"192.0.2.{n}/32"}]} for n in range(2)]
        answers = await asyncio.gather(
            *[
                who.put("/security/ip-rules", body, headers={"if-match": tag})
                for who, body in zip((first, second), bodies, strict=True)
            ]
        )
        assert sorted(answer.status for answer in answers) == [200, 412]
        loser = next(answer for answer in answers if answer.status == 412)
        assert loser.code == "precondition_failed"
        assert loser.json()["current_version"] == shown.json()["version"] + 1


class Loaded:
    """A client that signs in with wrong passwords as fast as it may, from one address."""

    def __init__(self, kit: Kit, address: str) -> None:
        self.client = From(kit.client, address)
        self.passed = 0
        self.slowest = 0.0

    async def call(self) -> int:
        with Stopwatch() as watch:
            answer = await self.client.get("/auth/config")
        self.slowest = max(self.slowest, watch.seconds)
        self.passed += answer.status == 200
        return answer.status


@pytest.mark.redis
async def test_conventions_7_losing_redis_delays_nobody_and_keeps_each_process_to_its_share(
    make_kit: Callable[..., Any], valkey_server: ValkeyServer
) -> None:
    """120 calls a minute and address. Two processes share them by Redis, and half each without it."""
    config = {**TRUSTING, "rate_limits": True, "redis.url": valkey_server.url()}
    one: Kit = await make_kit(plugins=["security"], config=config)
    two: Kit = await make_kit(plugins=["security"], config=config)
    limits: list[Any] = [kit.kernel.container.get(RateLimits) for kit in (one, two)]
    shared = [each._shared for each in limits]
    async with asyncio.timeout(60):
        while not all(each.connected and each.processes == 2 for each in shared):
            for kit in (one, two):  # who serves nobody takes no share
                await From(kit.client, "192.0.2.1").get("/auth/config")
            await asyncio.sleep(0.5)

    together, began = [Loaded(kit, HOME) for kit in (one, two)], time.monotonic()
    for _ in range(150):
        for each in together:
            await each.call()
        await asyncio.sleep(0.01)
    passed = sum(each.passed for each in together)
    given_back = 2 * (time.monotonic() - began)
    print(f"with Redis: {passed} of 300 passed")
    assert 118 <= passed <= 120 + 20 + given_back  # what both let pass before they heard of each other

    alone = [Loaded(kit, AWAY) for kit in (one, two)]
    for each in alone:
        assert await each.call() == 200
    await asyncio.to_thread(valkey_server.stop)
    began = time.monotonic()
    for _ in range(200):
        await asyncio.gather(*[each.call() for each in alone])
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - began
    for each in alone:
        print(f"without Redis: {each.passed} passed in {seconds:.1f} s, the slowest took {each.slowest * 1000:.0f} ms")
        assert each.slowest < 2
        assert each.passed <= 60 + seconds + 20  # its half, what time gave back, and what passed before it was noticed
    assert not any(each.connected for each in shared)
