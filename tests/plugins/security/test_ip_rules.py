"""Rules about networks: what they say, who changes them, what they cost."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.plugins.security.conftest import AWAY, HOME, From

from corral import clock
from corral.errors import Forbidden
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.security.service.ip_rules import (
    ActiveIpRules,
    IpGate,
    IpGateUpdater,
    IpRule,
    IpRules,
    IpRuleset,
    parse_network,
)

pytestmark = pytest.mark.one_engine


def rules(mode: str, *lines: str) -> dict[str, Any]:
    """`allow 10.0.0.0/8` and so on, as a body."""
    pairs = [line.split() for line in lines]
    return {"mode": mode, "rules": [{"action": action, "cidr": cidr} for action, cidr in pairs]}


async def replace(kit: Kit, who: Client, body: dict[str, Any], **options: Any) -> Answer:
    """Change the rules, and have them in force here without waiting for the keeper."""
    answer = await who.put("/security/ip-rules", body, **options)
    await kit.kernel.container.get(IpGateUpdater).load_rules()
    return answer


def test_the_most_specific_network_wins_and_of_two_the_same_block() -> None:
    lines = (
        "allow 10.0.0.0/8",
        "block 10.1.0.0/16",
        "allow 10.1.1.1/32",
        "block 10.1.1.1/32",
        "block 2001:db8::/32",
        "allow 10.1.2.0/24",
    )
    found = [IpRule(str(number), line.split()[1], line.split()[0]) for number, line in enumerate(lines, 1)]
    expected = {
        "10.9.9.9": "1",
        "10.1.9.9": "2",
        "10.1.1.1": "4",
        "10.1.2.3": "6",
        "2001:db8::1": "5",
        "192.0.2.1": None,
    }
    for mode in ("allowlist", "blocklist"):
        ruleset = IpRuleset(mode, found)
        for address, identifier in expected.items():
            allowed, rule = ruleset.evaluate(address)
            assert (rule.id if rule else None) == identifier
            assert allowed == (rule.action == "allow" if rule else mode == "blocklist")
        assert ruleset.evaluate("")[0] == (mode == "blocklist")


@pytest.mark.parametrize("seed", range(20))
def test_the_compiled_rules_judge_as_a_plain_search_does(seed: int) -> None:
    """Against the obvious algorithm, with random networks that lie in each other."""
    dice = random.Random(seed)
    made: dict[tuple[str, str], IpRule] = {}
    for number in range(200):
        base, length = dice.choice([("10.0.0.0", 32), ("2001:db8::", 128)])
        prefix = dice.randint(8 if length == 32 else 32, length)
        within = int(ipaddress.ip_address(base)) | dice.getrandbits(14)
        network = str(ipaddress.ip_network((within, prefix), strict=False))
        action = dice.choice(["allow", "block"])
        made[(network, action)] = IpRule(str(number), network, action)
    ruleset = IpRuleset("blocklist", made.values())
    networks = [(ipaddress.ip_network(rule.cidr), rule) for rule in made.values()]
    networks.sort(key=lambda item: (item[0].prefixlen, item[1].action == "block"))
    for _ in range(500):
        base = dice.choice(["10.0.0.0", "2001:db8::"])
        address = ipaddress.ip_address(int(ipaddress.ip_address(base)) | dice.getrandbits(14))
        holding = [rule for network, rule in networks if address in network]
        assert ruleset.evaluate(str(address)) == (
            (holding[-1].action == "allow", holding[-1]) if holding else (True, None)
        )


def test_mapped_networks_are_folded_and_host_bits_refused() -> None:
    assert parse_network("::ffff:192.0.2.0/120") == "192.0.2.0/24"
    assert parse_network("192.0.2.1") == "192.0.2.1/32"
    assert parse_network("2001:DB8:0::/48") == "2001:db8::/48"
    for wrong in ("192.0.2.1/24", "2001:db8::1/32", "300.0.0.0/8", "none", "::ffff:192.0.2.1/120", "fe80::%eth0/64"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_network(wrong)


def test_health_answers_everybody_and_nothing_else_does() -> None:
    gate = IpGate()
    gate.set_rules(ActiveIpRules(1, IpRuleset("allowlist", []), 0, None))
    for path in ("/health", "/health/", "/health/ready", "/api/v1/health", "/api/v1/health/ready"):
        gate.check(AWAY, "GET", path)
    for path in ("/", "/healthy", "/api/v1/health-records", "/api/v1/healthcare/1", "/api/v1/tasks"):
        with pytest.raises(Forbidden):
            gate.check(AWAY, "GET", path)


def test_a_judgement_costs_little_with_500_rules() -> None:
    """Microseconds, each address a new one; of addresses seen before it is a look-up."""
    lines = [IpRule(str(n), f"10.{n % 250}.{n // 250 * 16}.0/{20 + n % 10}", "block") for n in range(500)]
    lines = [IpRule(rule.id, str(ipaddress.ip_network(rule.cidr, strict=False)), rule.action) for rule in lines]
    gate = IpGate()
    gate.set_rules(ActiveIpRules(1, IpRuleset("blocklist", lines), 500, None))
    addresses = [f"192.0.{n // 250}.{n % 250}" for n in range(5000)]

    def timed() -> float:
        began = time.process_time()
        for address in addresses:
            gate.check(address, "GET", "/api/v1/tasks")
        return (time.process_time() - began) / len(addresses) * 1e6

    first, again = timed(), min(timed() for _ in range(5))
    print(f"gate: {first:.2f} us for a new address, {again:.2f} us for a known one")
    assert first < 100
    assert again < 10


async def test_blocked_clients_reach_health_alone(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    assert (await replace(kit, admin, rules("blocklist", f"block {AWAY}/32"))).status == 200
    away = From(kit.client, AWAY)
    for path, root in (("/tasks", False), ("/nothing", False), ("/auth/login", False), ("/metrics", True)):
        answer = await away.get(path, root=root)
        assert (answer.status, answer.code) == (403, "ip_blocked"), path
    assert (await away.get("/health", root=True)).status == 200
    assert (await away.get("/health/ready")).status == 200
    assert (await admin.get("/tasks")).status == 200
    for address, allowed in ((AWAY, False), (HOME, True), (f"::ffff:{AWAY}", False)):
        told = (await admin.post("/security/ip-rules/check", {"ip": address})).json()
        assert (told["allowed"], (told["rule"] or {}).get("cidr")) == (allowed, None if allowed else f"{AWAY}/32")
    assert (await admin.post("/security/ip-rules/check", {"ip": "nonsense"})).status == 422


async def test_networks_are_judged_before_the_lock_out(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    body = rules("allowlist", "allow 10.0.0.0/8", "allow 10.0.0.1/8", "block 10.0.0.0/8", "allow 10.0.0.0/8")
    answer = await admin.put("/security/ip-rules", body)
    assert answer.status == 422
    found = [(item["pointer"], item["code"]) for item in answer.json()["errors"]]
    assert found == [("/rules/1/cidr", "bad_format"), ("/rules/3/cidr", "not_unique")]
    assert (await admin.get("/security/ip-rules")).json()["rules"] == []
    locked = await admin.put("/security/ip-rules", rules("allowlist", "allow 10.0.0.0/8"))
    assert (locked.status, locked.code, locked.json()["your_ip"]) == (409, "would_lock_out", HOME)


async def test_expired_rules_do_not_count_and_are_swept(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    body = rules("blocklist", f"block {AWAY}/32", "block 192.0.2.0/24")
    body["rules"][0] |= {"expires_at": (datetime.now(UTC) + timedelta(seconds=60)).isoformat(), "note": "for a minute"}
    assert (await replace(kit, admin, body)).status == 200
    gate, service = kit.kernel.container.get(IpGate), kit.kernel.container.get(IpRules)
    assert (await From(kit.client, AWAY).get("/tasks")).code == "ip_blocked"
    assert not gate.is_stale
    clock.travel(61)
    assert gate.is_stale
    await kit.kernel.container.get(IpGateUpdater).load_rules()
    assert (await From(kit.client, AWAY).get("/tasks")).status == 401
    assert await kit.kernel.database.work(service.delete_expired) == 1
    assert [rule["cidr"] for rule in (await admin.get("/security/ip-rules")).json()["rules"]] == ["192.0.2.0/24"]


async def test_a_rule_that_stays_keeps_its_identity(kit: Kit) -> None:
    admin, other = From(await kit.as_user("admin"), HOME), From(await kit.as_user("admin"), HOME)
    first = (await replace(kit, admin, rules("blocklist", "block 192.0.2.0/24", "block 10.0.0.0/8"))).json()["rules"]
    then = (await replace(kit, other, rules("blocklist", "block 10.0.0.0/8", "allow 10.0.0.0/9"))).json()["rules"]
    assert then[0] == first[1]
    assert then[1]["created_by"] == other.user["id"]


async def test_a_refusal_is_recorded_once_a_minute_for_each_address(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    await replace(kit, admin, rules("blocklist", "block 203.0.113.0/24"))
    gate = kit.kernel.container.get(IpGate)
    for _ in range(5):
        for address in (AWAY, "203.0.113.10"):
            with pytest.raises(Forbidden):
                gate.check(address, "GET", "/api/v1/tasks")
    assert sorted(gate.take_rejected_addresses()) == ["203.0.113.10", AWAY]
    with pytest.raises(Forbidden):
        gate.check(AWAY, "GET", "/api/v1/tasks")
    assert gate.take_rejected_addresses() == []
    clock.travel(61)
    with pytest.raises(Forbidden):
        gate.check(AWAY, "GET", "/api/v1/tasks")
    assert gate.take_rejected_addresses() == [AWAY]


async def test_changes_and_refusals_are_in_the_audit_log(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    await replace(kit, admin, rules("blocklist", f"block {AWAY}/32"))
    for _ in range(3):
        await From(kit.client, AWAY).get("/tasks")
    async with asyncio.timeout(60):
        while True:
            rows = (await admin.get("/admin/audit?action=security.ip_rules.*")).json()["items"]
            if len(rows) == 2:
                break
            await asyncio.sleep(0.1)
    refusal, change = rows
    assert (refusal["action"], refusal["outcome"], refusal["actor"]["ip"]) == (
        "security.ip_rules.refuse",
        "denied",
        AWAY,
    )
    assert change["actor"]["id"] == admin.user["id"]
    assert {item["field"]: item["to"] for item in change["changes"]}["rules"] == [f"block {AWAY}/32"]


async def test_a_refusal_tells_no_address_where_none_is_to_be_kept(kit: Kit) -> None:
    admin = From(await kit.as_user("admin"), HOME)
    assert (await admin.put("/settings/audit/record_ip", {"value": False})).status == 200
    await replace(kit, admin, rules("blocklist", f"block {AWAY}/32"))
    await From(kit.client, AWAY).get("/tasks")
    async with asyncio.timeout(60):
        while True:
            rows = (await admin.get("/admin/audit?action=security.ip_rules.refuse")).json()["items"]
            if rows:
                break
            await asyncio.sleep(0.1)
    assert rows[0]["code"] == "ip_blocked"
    assert AWAY not in str(rows)


async def test_members_see_and_change_nothing(kit: Kit) -> None:
    member = await kit.as_user("member")
    for method, path, body in (
        ("GET", "/security", None),
        ("PUT", "/security", {}),
        ("GET", "/security/password-policy", None),
        ("PUT", "/security/password-policy", {}),
        ("GET", "/security/ip-rules", None),
        ("PUT", "/security/ip-rules", {"mode": "off", "rules": []}),
        ("POST", "/security/ip-rules/check", {"ip": HOME}),
        ("GET", "/security/sessions", None),
        ("POST", f"/security/users/{member.user['id']}/revoke-sessions", {}),
    ):
        assert (await member.request(method, path, body)).code == "forbidden", path


async def test_the_audit_log_tells_when_a_rule_begins_to_end(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    for end in ({}, {"expires_at": "2999-01-01T00:00:00Z"}):
        rule = {"action": "block", "cidr": f"{AWAY}/32", **end}
        assert (await admin.put("/security/ip-rules", {"mode": "off", "rules": [rule]})).status == 200
    rows = (await admin.get("/admin/audit?action=security.ip_rules.change")).json()["items"]
    block = f"block {AWAY}/32"
    assert [row["changes"] for row in rows] == [
        [{"field": "rules", "from": [block], "to": [f"{block} until 2999-01-01T00:00:00.000Z"]}],
        [{"field": "rules", "from": [], "to": [block]}],
    ]
