"""Limits: what passes, what is told, and what counting costs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.limits import stop_refilling
from tests.plugins.security.conftest import AWAY, HOME, PLUGINS, TRUSTING, From, make_key

from corral.auth.principal import Principal
from corral.http.client_address import address_key
from corral.http.routes import Rate, Route
from corral.plugin import RateLimiter, RateLimits, Settings
from corral.testing.kit import Answer, Kit
from corral.testing.server import ServerProcess
from corral_core.redis.api import SharedBuckets
from corral_plugins.security.service.ip_rules import IpGate
from corral_plugins.security.service.rate_limits import BucketFull, RequestLimits, TokenBuckets

pytestmark = pytest.mark.one_engine

ON = {**TRUSTING, "rate_limits": True}


class Clock:
    """Time as the test tells it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def limited(make_kit: Callable[..., Any]) -> Kit:
    """A kernel that counts."""
    made: Kit = await make_kit(plugins=PLUGINS, config=ON)
    return made


async def many(number: int, call: Callable[[], Any]) -> list[Answer]:
    """The same call many times, at once."""
    return list(await asyncio.gather(*[call() for _ in range(number)]))


def passed(buckets: TokenBuckets, key: str, tries: int) -> int:
    """How many of so many tries get through."""
    count = 0
    for _ in range(tries):
        try:
            buckets.take_token(key)
        except BucketFull:
            continue
        count += 1
    return count


def test_a_bucket_lets_its_count_pass_and_then_what_time_gives_back() -> None:
    at = Clock()
    buckets = TokenBuckets(Rate("ten", 10, 60), now=at)
    assert buckets.take_token("a") == (10, 9, 6)
    assert passed(buckets, "a", 20) == 9
    assert passed(buckets, "b", 20) == 10
    at.now += 6
    assert passed(buckets, "a", 5) == 1
    with pytest.raises(BucketFull) as full:
        buckets.take_token("a")
    assert full.value.limit == 10
    assert full.value.seconds == pytest.approx(6, abs=0.01)
    at.now += 6000
    assert passed(buckets, "a", 20) == 10


@pytest.mark.parametrize("seed", range(10))
def test_buckets_pass_what_the_textbook_passes(seed: int) -> None:
    """Against the usual form of the algorithm: tokens that are counted and refilled."""
    dice, at = random.Random(seed), Clock()
    count, seconds = dice.choice([(10, 60), (5, 3600), (1200, 60), (20, 1)])
    buckets = TokenBuckets(Rate("x", count, seconds), now=at)
    tokens, last = dict.fromkeys("abc", float(count)), dict.fromkeys("abc", at.now)
    for _ in range(3000):
        at.now += dice.expovariate(count / seconds * 4)
        key = dice.choice("abc")
        tokens[key] = min(float(count), tokens[key] + (at.now - last[key]) * count / seconds)
        last[key] = at.now
        if abs(tokens[key] - 1) < 1e-6:  # too close to call
            return
        expected = tokens[key] >= 1
        tokens[key] -= expected
        assert passed(buckets, key, 1) == expected


def test_memory_holds_two_windows_and_no_more() -> None:
    at = Clock()
    buckets = TokenBuckets(Rate("x", 10, 60), now=at)
    for number in range(10_000):
        buckets.take_token(str(number))
    for _ in range(3):
        at.now += 61
        buckets.take_token("later")
    assert buckets.bucket_count <= 2


def test_many_addresses_in_one_window_do_not_fill_the_memory() -> None:
    buckets = TokenBuckets(Rate("x", 5, 3600), now=Clock())
    for number in range(350_000):
        buckets.take_token(str(number))
    assert buckets.bucket_count <= 200_000
    assert passed(buckets, "349999", 10) == 4  # those of late are known still


def test_a_share_is_a_fraction_but_one_at_least() -> None:
    at = Clock()
    for count, share, expected in ((10, 2, 5), (5, 8, 1), (1200, 4, 300)):
        buckets = TokenBuckets(Rate("x", count, 60), now=at)
        buckets.set_limit(count, share)
        assert passed(buckets, "a", 2000) == expected


def test_clients_of_ipv6_are_networks_of_64_bits() -> None:
    assert address_key("2001:db8:1:2:3::4") == address_key("2001:db8:1:2::9") == "2001:db8:1:2::"
    assert address_key("2001:db8:1:3::9") != address_key("2001:db8:1:2::9")
    assert address_key("192.0.2.1") == "192.0.2.1"


async def test_without_a_credential_an_address_has_120_a_minute(limited: Kit) -> None:
    away = From(limited.client, AWAY)
    first = await away.get("/auth/config")
    assert (first.headers["ratelimit-limit"], first.headers["ratelimit-remaining"]) == ("120", "119")
    answers = await many(130, lambda: away.get("/nothing"))  # what is not served counts too
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} == {404, 429}
    assert 10 <= len(refused) <= 12
    assert refused[0].code == "rate_limited"
    assert 1 <= int(refused[0].headers["retry-after"]) <= 2
    assert (refused[0].headers["ratelimit-remaining"], refused[0].headers["ratelimit-limit"]) == ("0", "120")
    assert (await away.request("OPTIONS", "/tasks")).status == 429
    for _ in range(5):
        assert (await away.get("/health", root=True)).status == 200
        assert (await away.get("/metrics", root=True)).status == 200
    assert (await From(limited.client, HOME).get("/auth/config")).status == 200
    text = (await limited.client.get("/metrics", root=True)).body.decode()
    assert 'corral_rate_limited_total{bucket="anonymous"}' in text


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"x-api-key": "crl_wrong"}),
        (401, {"authorization": "Basic YTpi"}),
        (401, {"authorization": "Bearer"}),
        (400, {"authorization": "Bearer one", "x-api-key": "another"}),
    ],
)
async def test_a_wrong_credential_counts_as_none(limited: Kit, status: int, headers: dict[str, str]) -> None:
    away = From(limited.client, AWAY)
    answers = await many(130, lambda: away.get("/tasks", headers=headers))
    assert {answer.status for answer in answers} == {status, 429}
    assert sum(answer.status == 429 for answer in answers) <= 12
    alice = From(await limited.as_user("member"), AWAY)  # whose own requests go on behind the same address
    assert (await alice.get("/tasks")).status == 200


async def test_a_key_at_a_wrong_place_counts_as_none_and_takes_nothing_from_its_owner(limited: Kit) -> None:
    key, _ = await make_key(await limited.as_user("member"), allowed_cidrs=[HOME])
    answers = await many(130, lambda: From(key, AWAY, key=key.key).get("/tasks"))
    assert {answer.status for answer in answers} == {403, 429}
    answer = await From(key, HOME, key=key.key).get("/tasks")
    assert (answer.status, answer.headers["ratelimit-remaining"]) == (200, "1199")


async def test_no_credential_counts_once(limited: Kit) -> None:
    first, second = [await From(limited.client, AWAY).get("/tasks") for _ in range(2)]
    assert (first.status, first.headers["ratelimit-remaining"]) == (401, "119")
    assert second.headers["ratelimit-remaining"] == "118"


async def test_people_and_keys_have_buckets_of_their_own(limited: Kit) -> None:
    admin, alice = await limited.as_user("admin"), await limited.as_user("member")
    key, _ = await make_key(alice)
    assert (await admin.put("/settings/http/rate_per_minute", {"value": 10})).status == 200
    limits: Any = limited.kernel.container.get(RateLimits)
    async with asyncio.timeout(60):
        while limits._people.count != 10:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.05)
    answers = [await alice.get("/tasks") for _ in range(12)]
    assert answers[0].headers["ratelimit-limit"] == "10"
    assert answers[-1].code == "rate_limited"
    assert (await key.get("/tasks")).status == 200
    assert (await admin.get("/tasks")).status == 200


async def test_an_address_signs_in_ten_times_a_minute(limited: Kit) -> None:
    body = {"email": "nobody@example.org", "password": "nothing"}
    away = From(limited.client, AWAY)
    answers = [await away.post("/auth/login", body) for _ in range(11)]
    assert answers[0].headers["ratelimit-limit"] == "10"  # the tightest of the two it counts for
    assert answers[-1].code == "rate_limited"
    assert "rate_limited" not in {answer.code for answer in answers[:10]}
    assert (await From(limited.client, HOME).post("/auth/login", body)).code != "rate_limited"


async def test_an_address_registers_five_times_an_hour(limited: Kit) -> None:
    answers = [await From(limited.client, AWAY).post("/auth/register", {}) for _ in range(6)]
    assert [answer.status for answer in answers] == [422] * 5 + [429]
    assert 600 <= int(answers[-1].headers["retry-after"]) <= 720


async def test_a_caller_has_60_requests_in_flight(limited: Kit) -> None:
    alice, bob = await limited.as_user("member"), await limited.as_user("member")
    waiting = [asyncio.create_task(alice.get("/events?types=task.*&wait=30")) for _ in range(60)]
    limits: Any = limited.kernel.container.get(RateLimits)
    async with asyncio.timeout(60):
        while limits._in_flight.get(alice.user["id"], 0) < 60:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)
    refused = await alice.get("/tasks")
    assert (refused.status, refused.code) == (429, "concurrency_limit")
    assert "retry-after" in refused.headers
    assert (await bob.get("/tasks")).status == 200
    began = time.monotonic()
    assert (await bob.post("/tasks", {"title": "what the others wait for"})).status == 201
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
    print(f"the waiting requests ended after {time.monotonic() - began:.2f} s")
    assert (await alice.get("/tasks")).status == 200
    assert limits._in_flight == {}


async def test_off_means_off(kit: Kit) -> None:
    answers = await many(300, lambda: kit.client.get("/auth/config"))
    assert {answer.status for answer in answers} == {200}
    assert "ratelimit-limit" not in answers[0].headers
    admin = await kit.as_user("admin")
    assert "rate_limits_off" in (await admin.get("/security")).json()["warnings"]


async def test_conventions_8_a_forged_forwarded_for_changes_nothing(make_kit: Callable[..., Any]) -> None:
    """Limits, the audit log and the IP rules all see the peer."""
    kit: Kit = await make_kit(plugins=PLUGINS, config={"rate_limits": True})
    stop_refilling(kit)
    admin = await kit.as_user("admin")
    forged = {"x-forwarded-for": "1.2.3.4"}
    for number in range(121):
        answer = await kit.client.get("/auth/config", headers={"x-forwarded-for": f"1.2.3.{number}"})
    assert answer.status == 429
    told = (await admin.get("/security/ip-rules", headers=forged)).json()
    assert told["your_ip"] == "127.0.0.1"
    body = {"mode": "allowlist", "rules": [{"action": "allow", "cidr": "1.2.3.4/32"}]}
    assert (await admin.put("/security/ip-rules", body, headers=forged)).code == "would_lock_out"
    changed = await admin.put("/security", {"step_up_seconds": 120}, headers=forged)
    assert changed.status == 200
    rows = (await admin.get("/admin/audit?limit=200")).json()["items"]
    assert {row["actor"]["ip"] for row in rows} <= {"127.0.0.1", None}
    assert any(row["actor"]["ip"] == "127.0.0.1" for row in rows)


class Nowhere:
    """Shared buckets of an installation without Redis."""

    connected, processes, is_configured = False, 1, False

    async def add(self, seconds: Any) -> None:
        return None

    async def close(self) -> None:
        """Nothing to leave."""


def test_gates_and_limits_together_cost_less_than_ten_microseconds(long_form: bool) -> None:
    """One authenticated request's share of it, as the request path calls them."""

    class Defaults:
        def get(self, setting: Any) -> Any:
            return None

    settings: Settings = Defaults()
    shared: SharedBuckets = Nowhere()
    limits, gate = RequestLimits(), IpGate()
    limits.start(settings, shared, Any, on=True, processes=1)  # type: ignore[arg-type]  # uses: of keys only
    assert isinstance(limits, RateLimiter)
    assert not isinstance(gate, RateLimiter)
    route = Route(method="GET", path="/tasks", handler=lambda: None, tag="", needs=("tasks.read",))
    callers = [Principal(kind="worker", id=f"01a216b4-06ab-770c-a9ce-{n:012x}") for n in range(100)]

    def request(caller: Principal) -> None:
        gate.check(HOME, "GET", "/api/v1/tasks")
        limits.arrive(HOME, route, anonymous=False)
        limits.enter(caller, route, HOME)
        limits.leave(caller)

    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            for caller in callers:
                request(caller)
        best = min(best, (time.perf_counter() - began) / 1000 * 1e6)
    print(f"gates and limits: {best:.2f} us a request")
    assert best < (10 if long_form else 50)


def test_processes_without_redis_share_the_figures(tmp_path: Path) -> None:
    """Two on one address, of which each counts alone: 60 of the 120 calls a minute are its share."""
    arguments = ("--processes", "2", "--no-embedded-worker", "--no-jobs")
    with ServerProcess(tmp_path, arguments=arguments, environ={"CORRAL_RATE_LIMITS": "on"}) as server:
        began, passed = time.monotonic(), 0
        for _ in range(40):  # connections, which the processes take as they come
            with server.client() as client:
                answers = [client.get("/auth/config") for _ in range(10)]
            passed += sum(answer.status_code == 200 for answer in answers)
            assert {answer.headers["ratelimit-limit"] for answer in answers} == {"60"}
        seconds = time.monotonic() - began
    print(f"{passed} of 400 passed in {seconds:.1f} s")
    assert 60 <= passed <= 120 + 2 * seconds + 2
