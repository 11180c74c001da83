"""Which price applies, and the resulting cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.plugins.cost.conftest import Books

from corral import clock
from corral_plugins.cost.api import TokenCounts
from corral_plugins.cost.service import price_overrides, price_table
from corral_plugins.cost.service.money import cost_of_tokens, to_micro_usd, to_usd
from corral_plugins.cost.service.pricing import Pricing

ONE = {"provider": "acme", "model": "one", "input_usd": 1, "output_usd": 4}


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(Decimal("0.0000005"), 1), (Decimal("0.00000049"), 0), (0.1, 100_000), (1.0000015, 1_000_002), (-0.5, -500_000)],
)
def test_money_is_integer_micro_dollars_rounded_half_up(amount: Any, expected: int) -> None:
    assert to_micro_usd(amount) == expected
    assert to_usd(expected) == expected / 1_000_000


def test_a_call_is_rounded_once() -> None:
    assert cost_of_tokens([(1, 250_000), (1, 250_000)]) == 1  # two quarters make a half
    assert cost_of_tokens([(1, 499_999)]) == 0
    assert cost_of_tokens([(100_000_000, 10**12)]) == 10**14


def test_the_table_never_counts_cache_tokens_twice() -> None:
    now = clock.now()
    plain = price_table.charge_by_table("openai", "gpt-4o", TokenCounts(input_tokens=1_000_000), now)
    cached = price_table.charge_by_table("openai", "gpt-4o", TokenCounts(cache_read_tokens=1_000_000), now)
    both = price_table.charge_by_table(
        "openai", "gpt-4o", TokenCounts(input_tokens=1_000_000, cache_read_tokens=1_000_000), now
    )
    assert plain is not None
    assert cached is not None
    assert 0 < cached < plain
    assert both == plain + cached


@pytest.mark.parametrize(("provider", "model"), [("openai", "no-such-model"), ("my-own", "gpt-4o")])
def test_models_missing_in_the_table_have_no_price(provider: str, model: str) -> None:
    assert price_table.charge_by_table(provider, model, TokenCounts(input_tokens=5), clock.now()) is None
    assert price_table.look_up_price(provider, model, clock.now()) is None


def test_a_model_without_a_price_for_used_tokens_is_unpriced() -> None:
    embedding = next(row for row in price_table.all_prices() if row.input_usd and row.output_usd is None)
    assert (
        price_table.charge_by_table(embedding.provider, embedding.model, TokenCounts(output_tokens=5), clock.now())
        is None
    )


@pytest.mark.one_engine
async def test_price_sources_are_tried_in_order(books: Any) -> None:
    tokens = {"input_tokens": 1_000_000}
    named = {"provider": "openai", "model": "gpt-4o", **tokens}
    listed = await books.settle(**named)
    assert (listed.price_source, listed.price_version) == ("table", price_table.price_table_version())
    created = await books.admin.post("/cost/prices", {**ONE, "provider": "openai", "model": "gpt-4o"})
    assert created.status == 201, created
    price = created.json()
    ours = await books.settle(**named)
    assert (ours.price_source, ours.cost_micro_usd) == ("override", 1_000_000)
    assert ours.price_version == f"{price['id']}@1"
    told = await books.settle("0.25", **named)
    assert (told.price_source, told.cost_micro_usd) == ("reported", 250_000)
    free = await books.settle("0.25", free=True, **named)
    assert (free.price_source, free.cost_micro_usd) == ("zero", 0)
    for provider in ("local", "scripted", "builtin"):
        assert (await books.settle(provider=provider, model="any", **tokens)).price_source == "zero"
    assert (await books.settle(**tokens)).priced is False


@pytest.mark.one_engine
async def test_a_price_that_would_have_no_effect_is_refused(books: Any) -> None:
    price = {"provider": "acme", "model": "*", "input_usd": 1, "output_usd": 1}
    made = (await books.admin.post("/cost/prices", price)).json()
    for provider in ("local", "scripted", "Builtin"):
        for answer in (
            await books.admin.post("/cost/prices", {**price, "provider": provider}),
            await books.admin.put(f"/cost/prices/{made['id']}", {"provider": provider}),
        ):
            assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/provider"), answer
    assert (await books.admin.post("/cost/prices", {**price, "provider": "loc*"})).status == 201  # "local-ai"


@pytest.mark.one_engine
async def test_without_reported_prices_a_report_counts_only_where_no_table_does(make_kit: Callable[..., Any]) -> None:
    books = await Books().build(await make_kit(plugins=["cost"], config={"settings.cost.reported_prices": False}))
    listed = await books.settle("9", provider="openai", model="gpt-4o", input_tokens=1_000_000)
    assert (listed.price_source, listed.cost_usd) == ("table", 2.5)
    unlisted = await books.settle("9", input_tokens=1_000_000)
    assert (unlisted.price_source, unlisted.cost_usd) == ("reported", 9)
    correction = await books.settle("-9", provider="openai", model="gpt-4o")
    assert (correction.price_source, correction.cost_usd) == ("reported", -9)


@pytest.mark.one_engine
async def test_the_most_specific_pattern_wins(books: Any) -> None:
    patterns = {("*", "*"): 1, ("acme", "*"): 2, ("*", "one*"): 3, ("a*", "one-?"): 4, ("acme", "one-1"): 5}
    for (provider, model), price in patterns.items():
        body = {"provider": provider, "model": model, "input_usd": price, "output_usd": 0}
        assert (await books.admin.post("/cost/prices", body)).status == 201

    async def found(provider: str, model: str) -> Any:
        return (await books.read(f"prices/lookup?provider={provider}&model={model}"))["input_usd"]

    assert await found("other", "two") == 1
    assert await found("acme", "two") == 2
    assert await found("acme", "one-22") == 3
    assert await found("acme", "one-2") == 4
    assert await found("ACME", "One-1") == 5
    assert await found("local", "one-1") == 0


@pytest.mark.one_engine
async def test_a_price_holds_from_its_instant_on(books: Any) -> None:
    for price, since in ((1, "2020-01-01T00:00:00+02:00"), (2, "2021-01-01T00:00:00Z"), (3, "2999-01-01T00:00:00Z")):
        body = {**ONE, "input_usd": price, "valid_from": since}
        assert (await books.admin.post("/cost/prices", body)).status == 201
    lookup = "prices/lookup?provider=acme&model=one"
    assert await books.read(f"{lookup}&at=2019-06-01T00:00:00Z") == {"priced": False}
    assert (await books.read(f"{lookup}&at=2020-06-01T00:00:00Z"))["input_usd"] == 1
    assert (await books.read(lookup))["input_usd"] == 2
    assert (await books.settle(input_tokens=1_000_000)).cost_usd == 2


@pytest.mark.one_engine
async def test_all_kinds_of_tokens_and_the_call_count(books: Any) -> None:
    used = {
        "input_tokens": 1_000_000,
        "output_tokens": 500_000,
        "cache_read_tokens": 10**6,
        "cache_write_tokens": 10**6,
    }
    answer = await books.admin.post("/cost/prices", {**ONE, "per_call_usd": 0.5, "cache_read_usd": 0.1})
    assert answer.status == 201, answer
    assert (await books.settle(**used)).cost_usd == 0.5 + 1 + 2 + 0.1 + 1  # cache writes at the price of input
    put = await books.admin.put(f"/cost/prices/{answer.json()['id']}", {"cache_write_usd": 2, "per_call_usd": 0})
    assert put.status == 200, put
    assert (await books.settle(**used)).cost_usd == 1 + 2 + 0.1 + 2


async def test_overrides_are_changed_and_removed(books: Any) -> None:
    price = (await books.admin.post("/cost/prices", ONE)).json()
    path = f"/cost/prices/{price['id']}"
    twice = await books.admin.post("/cost/prices", {**ONE, "valid_from": price["valid_from"]})
    assert (twice.status, twice.code, twice.json()["existing_id"]) == (409, "duplicate", price["id"])
    stale = await books.admin.put(path, {"input_usd": 2}, headers={"if-match": '"7"'})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    changed = await books.admin.put(path, {"input_usd": 2}, headers={"if-match": '"1"'})
    assert (changed.status, changed.json()["version"], changed.headers["etag"]) == (200, 2, '"2"')
    assert (await books.settle(input_tokens=1_000_000)).price_version == f"{price['id']}@2"
    same = await books.admin.put(path, {})
    assert (same.status, same.json()["version"]) == (200, 2)
    assert (await books.admin.delete(path)).status == 204
    assert (await books.admin.delete(path)).status == 404
    assert (await books.settle(input_tokens=1_000_000)).priced is False


async def test_of_the_same_price_written_at_once_one_is_kept(books: Any) -> None:
    for day in range(1, 6):
        same = {**ONE, "valid_from": f"2026-01-0{day}T00:00:00Z"}
        answers = await asyncio.gather(*[books.admin.post("/cost/prices", same) for _ in range(6)])
        assert sorted(answer.status for answer in answers) == [201, *[409] * 5]
        others = [(await books.admin.post("/cost/prices", {**same, "model": f"m{n}"})).json() for n in range(6)]
        moved = [books.admin.put(f"/cost/prices/{price['id']}", {"model": "same"}) for price in others]
        answers = await asyncio.gather(*moved)
        assert sorted(answer.status for answer in answers) == [200, *[409] * 5]
        assert {answer.code for answer in answers} == {None, "duplicate"}


@pytest.mark.one_engine
async def test_the_number_of_prices_is_limited(books: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_overrides, "MAX_PRICES", 1)
    assert (await books.admin.post("/cost/prices", ONE)).status == 201
    refused = await books.admin.post("/cost/prices", {**ONE, "model": "two"})
    assert (refused.status, refused.code) == (429, "quota_exceeded")


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"input_usd": -1}, "/input_usd"),
        ({"provider": "a[b]"}, "/provider"),
        ({"model": ""}, "/model"),
        ({"valid_from": "2026-01-01T00:00:00"}, "/valid_from"),
        ({"price": 1}, "/price"),
    ],
)
async def test_prices_are_checked(books: Any, change: dict[str, Any], pointer: str) -> None:
    refused = await books.admin.post("/cost/prices", {**ONE, **change})
    assert (refused.status, [fault["pointer"] for fault in refused.json()["errors"]]) == (422, [pointer])
    incomplete = await books.admin.post("/cost/prices", {"provider": "a", "model": "b"})
    assert {fault["pointer"] for fault in incomplete.json()["errors"]} == {"/input_usd", "/output_usd"}


@pytest.mark.one_engine
async def test_everyone_reads_prices_and_admins_write_them(books: Any) -> None:
    viewer = await books.kit.as_user("viewer")
    auditor = await books.kit.as_user("auditor")
    price = (await books.admin.post("/cost/prices", ONE)).json()
    page = await books.read("prices?limit=2", by=viewer)
    assert [item["source"] for item in page["items"]] == ["override", "builtin"]
    assert page["total"] == len(price_table.all_prices()) + 1
    following = await books.read(f"prices?limit=2&cursor={page['next']}", by=viewer)
    assert {item["source"] for item in following["items"]} == {"builtin"}
    assert following["offset"] is None
    own = await books.read("prices?source=override")
    assert [item["id"] for item in own["items"]] == [price["id"]]
    named = await books.read("prices?source=builtin&provider=OPENAI&model=gpt-4o-mini")
    assert named["items"]
    assert all("gpt-4o-mini" in item["model"] for item in named["items"])
    assert (await books.member.post("/cost/prices", ONE)).status == 403
    assert (await books.member.put(f"/cost/prices/{price['id']}", {})).status == 403
    assert (await books.member.delete(f"/cost/prices/{price['id']}")).status == 403
    assert (await auditor.get("/cost/prices")).status == 403
    listed = named["items"][0]["id"]
    assert (await books.admin.put(f"/cost/prices/{listed}", {"input_usd": 1})).status == 404


async def test_a_quote_needs_no_unit_and_follows_other_processes(books: Any) -> None:
    pricing: Pricing = books.kit.kernel.container.get(Pricing)
    million = TokenCounts(input_tokens=1_000_000)
    assert books.cost.quote("acme", "one", million).priced is False
    assert books.cost.quote("scripted", "echo", million).cost_micro_usd == 0
    assert books.cost.quote("acme", "one", million, free=True).cost_micro_usd == 0
    assert books.cost.quote("openai", "gpt-4o", million).cost_usd == 2.5
    assert (await books.admin.post("/cost/prices", ONE)).status == 201
    await pricing.refresh_overrides()
    assert books.cost.quote("acme", "one", million).cost_usd == 1
