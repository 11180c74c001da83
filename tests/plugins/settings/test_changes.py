"""Values: what is taken, what is refused, and that nothing is stored on any error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.plugins.settings import conftest as it
from tests.plugins.settings.conftest import Shelf

TAKEN = [
    ("shelf.high", 30, 30),
    ("shelf.high", "30", 30),
    ("shelf.width", 2, 2.0),
    ("shelf.width", "2.5", 2.5),
    ("shelf.open", False, False),
    ("shelf.open", "false", False),
    ("shelf.wood", "ash", "ash"),
    ("shelf.label", "of oak", "of oak"),
    ("shelf.label", None, None),
    ("shelf.books", ["a", "b"], ["a", "b"]),
    ("shelf.depths", {"top": 3}, {"top": 3}),
]
REFUSED = [
    ("shelf.high", 101, "too_large"),
    ("shelf.high", -1, "too_small"),
    ("shelf.high", "many", "wrong_type"),
    ("shelf.high", 1.5, "wrong_type"),
    ("shelf.high", True, "wrong_type"),
    ("shelf.high", None, "wrong_type"),
    ("shelf.high", "030", "wrong_type"),
    ("shelf.width", 0.1, "too_small"),
    ("shelf.open", "yes", "wrong_type"),
    ("shelf.open", 1, "wrong_type"),
    ("shelf.wood", "pine", "not_in_enum"),
    ("shelf.label", "x", "too_short"),
    ("shelf.label", "x" * 21, "too_long"),
    ("shelf.label", "UPPER", "bad_format"),
    ("shelf.label", 5, "wrong_type"),
    ("shelf.books", ["a"] * 4, "too_long"),
    ("shelf.books", "a", "wrong_type"),
    ("shelf.books", [1], "wrong_type"),
    ("shelf.depths", {"top": "deep"}, "wrong_type"),
    ("shelf.lock", 5, "wrong_type"),
    ("shelf.depths", {"x" * 70_000: 1}, "too_long"),
]


async def test_values_are_json_of_the_declared_type(shelf: Shelf) -> None:
    for name, value, stored in TAKEN:
        answer = await shelf.put(name, value)
        assert (answer.status, answer.json().get("value")) == (200, stored), (name, value, answer)


@pytest.mark.one_engine
async def test_what_is_out_of_bounds_is_refused_with_the_bounds(shelf: Shelf) -> None:
    before = (await shelf.admin.get("/settings")).body
    for name, value, code in REFUSED:
        answer = await shelf.put(name, value)
        fault = answer.json()["errors"][0]
        assert (answer.status, fault["code"], fault["pointer"]) == (422, code, "/value"), (name, value, answer)
    told = (await shelf.put("shelf.high", 101)).json()
    assert "from 0 to 100" in told["detail"]
    assert "one of oak, ash" in (await shelf.put("shelf.wood", "pine")).json()["detail"]
    assert (await shelf.admin.get("/settings")).body == before


@pytest.mark.one_engine
async def test_unknown_settings_are_404_in_a_path_and_422_in_a_body(shelf: Shelf) -> None:
    assert (await shelf.put("shelf.nothing", 1)).status == 404
    assert (await shelf.put("nothing.high", 1)).status == 404
    assert (await shelf.admin.post("/settings/shelf/nothing/reset")).status == 404
    answer = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.nothing": 1, "shelf.high": 20}})
    assert (answer.status, answer.code) == (422, "unknown_setting")
    assert answer.json()["errors"][0]["pointer"] == "/settings/shelf.nothing"
    both = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.nothing": 1, "shelf.high": 200}})
    assert [fault["code"] for fault in both.json()["errors"]] == ["unknown_setting", "too_large"]
    assert shelf.get(it.HIGH) == 10


@pytest.mark.one_engine
async def test_rules_across_fields_are_judged_on_the_result_of_the_whole_body(shelf: Shelf) -> None:
    assert (await shelf.put("shelf.low", 50)).code == "validation_error"
    refused = await shelf.put("shelf.high", 0)  # its neighbour would be above it
    assert "shelf.low must not be above shelf.high" in refused.json()["detail"]
    moved = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.low": 50, "shelf.high": 60}})
    assert moved.json() == {"updated": ["shelf.high", "shelf.low"], "unchanged": []}
    assert (await shelf.admin.post("/settings/shelf/high/reset")).code == "validation_error"
    assert (shelf.get(it.LOW), shelf.get(it.HIGH)) == (50, 60)


async def test_changes_that_meet_are_judged_one_after_the_other(shelf: Shelf) -> None:
    """Each alone would be fine: low 8 with high 10, high 5 with low 1."""
    for _ in range(5):
        await asyncio.gather(shelf.put("shelf.low", 8), shelf.put("shelf.high", 5))
        assert shelf.get(it.LOW) <= shelf.get(it.HIGH)
        await shelf.admin.put("/settings/bulk", {"settings": {"shelf.low": 1, "shelf.high": 10}})


@pytest.mark.one_engine
async def test_a_stale_version_is_412(shelf: Shelf) -> None:
    first = await shelf.put("shelf.high", 20)
    assert first.headers["etag"] == '"1"'
    assert (await shelf.put("shelf.high", 21, headers={"If-Match": '"1"'})).json()["version"] == 2
    stale = await shelf.put("shelf.high", 22, headers={"If-Match": '"1"'})
    assert (stale.status, stale.code, stale.json()["current_version"]) == (412, "precondition_failed", 2)
    path = "/settings/shelf/high/reset"
    assert (await shelf.admin.post(path, headers={"If-Match": '"1"'})).status == 412
    assert (await shelf.admin.post(path, headers={"If-Match": '"2"'})).json()["version"] == 3
    assert (await shelf.put("shelf.high", 20, headers={"If-Match": '"3"'})).json()["version"] == 4


async def test_one_of_two_changes_with_one_version_wins(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    answers = await asyncio.gather(
        *[shelf.put("shelf.high", 30 + number, headers={"If-Match": '"1"'}) for number in range(6)]
    )
    assert sorted(answer.status for answer in answers) == [200] + [412] * 5


async def test_the_history_tells_who_changed_what(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    await shelf.put("shelf.high", 20)  # no change
    await shelf.admin.post("/settings/shelf/high/reset")
    await shelf.put("shelf.wood", "ash")
    items = (await shelf.admin.get("/settings/history")).json()["items"]
    assert [(item["category"], item["key"], item["from"], item["to"]) for item in items] == [
        ("shelf", "wood", "oak", "ash"),
        ("shelf", "high", 20, 10),
        ("shelf", "high", 10, 20),
    ]
    assert {item["by"] for item in items} == {shelf.admin.user["id"]}
    page = (await shelf.admin.get("/settings/history?category=shelf&key=high&limit=1")).json()
    assert (page["total"], page["items"][0]["to"]) == (2, 10)
    rest = (await shelf.admin.get(f"/settings/history?category=shelf&key=high&limit=1&cursor={page['next']}")).json()
    assert rest["items"][0]["to"] == 20


@pytest.mark.one_engine
async def test_events_tell_which_setting_but_no_value(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    await shelf.admin.post("/settings/shelf/high/reset")
    told = [event for event in await shelf.kit.events() if event.type == "setting.changed"]
    assert [event.payload() for event in told] == [
        {"category": "shelf", "key": "high", "source": "database"},
        {"category": "shelf", "key": "high", "source": "default"},
    ]
    assert {event.visibility for event in told} == {"admin"}


@pytest.mark.one_engine
async def test_urls_pass_the_egress_guard(shelf: Shelf) -> None:
    for url in ("http://169.254.169.254/latest", "http://127.0.0.1:8000", "ftp://8.8.8.8/x"):
        for answer, pointer in (
            (await shelf.put("shelf.shop", url), "/value"),
            (await shelf.admin.put("/settings/bulk", {"settings": {"shelf.shop": url}}), "/settings/shelf.shop"),
            (await shelf.admin.put("/plugins/shelf/config", {"settings": {"shelf.shop": url}}), "/settings/shelf.shop"),
        ):
            told = (answer.status, answer.code, answer.json()["errors"][0]["pointer"])
            assert told == (422, "url_blocked", pointer), (url, answer)
    assert (await shelf.put("shelf.shop", "https://8.8.8.8/shelves")).status == 200
    assert (await shelf.put("shelf.shop", None)).status == 200


@pytest.mark.one_engine
async def test_others_than_admins_are_kept_out(shelf: Shelf) -> None:
    member = await shelf.kit.as_user("member")
    for method, path, body in (
        ("GET", "/settings", None),
        ("GET", "/settings/schema", None),
        ("GET", "/settings/history", None),
        ("PUT", "/settings/shelf/high", {"value": 3}),
        ("PUT", "/settings/bulk", {"settings": {"shelf.high": 3}}),
        ("POST", "/settings/shelf/high/reset", None),
    ):
        assert (await member.request(method, path, body)).code == "forbidden", path


@pytest.mark.one_engine
async def test_settings_of_a_plugin_out_of_service_are_kept_and_hidden(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    shelf.kit.kernel.registry.change_state("shelf", "disabled", "a test")
    assert "shelf" not in (await shelf.admin.get("/settings")).json()
    assert "shelf" not in {each["name"] for each in (await shelf.admin.get("/settings/schema")).json()["categories"]}
    assert (await shelf.put("shelf.high", 30)).status == 404
    assert (await shelf.admin.post("/settings/shelf/high/reset")).status == 404
    bulk = {"settings": {"shelf.high": 30}}
    assert (await shelf.admin.put("/settings/bulk", bulk)).code == "unknown_setting"
    shelf.kit.kernel.registry.change_state("shelf", "active")
    assert (await shelf.shown("shelf.high"))["value"] == 20


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("schema.high", {}, "category.key"),
        ("bulk.x", {}, "category.key"),
        ("shelf.High", {}, "category.key"),
        ("shelf.api_key", {"kind": str, "default": ""}, "credential"),
        ("shelf.code", {"kind": str, "default": "1234", "secret": True}, "its default must be None"),
        ("shelf.high", {"env": "HIGH"}, "CORRAL_"),
        ("shelf.high", {"env": "CORRAL_BIND"}, "already used for another purpose"),
        (f"shelf.{'x' * 64}.y", {}, "category.key"),
        (f"{'s' * 40}.{'x' * 50}", {}, "longer than"),
    ],
)
def test_what_may_not_be_declared(name: str, options: dict[str, Any], told: str) -> None:
    from corral.plugin import Setting
    from corral.settings.registry import SettingsRegistry

    setting = Setting(**{"name": name, "kind": int, "default": 1, "title": "x", **options})
    with pytest.raises(ValueError, match=told):
        SettingsRegistry({}).declare([setting], "shelf")


@pytest.mark.one_engine
async def test_a_bulk_change_honours_if_match(shelf: it.Shelf) -> None:
    read = await shelf.admin.get("/settings")
    body = {"settings": {"shelf.width": 2}}
    tag = read.headers["etag"]
    assert (await shelf.admin.get("/settings?category=shelf&details=true")).headers["etag"] == tag
    assert (await shelf.put("shelf.high", 50)).status == 200  # another setting: the group was read before
    stale = await shelf.admin.put("/settings/bulk", body, headers={"if-match": tag})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert shelf.get(it.WIDTH) != 2.0
    fresh = (await shelf.admin.get("/settings")).headers["etag"]
    assert fresh != tag
    assert (await shelf.admin.put("/settings/bulk", body, headers={"if-match": fresh})).status == 200
    assert (await shelf.admin.put("/settings/bulk", body, headers={"if-match": "*"})).status == 200
