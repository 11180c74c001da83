"""`/metrics`. The numbers are those of "Done when" of the page on health and metrics; the others are in
`test_done_when.py`.

Waiting: `corral_dead_letters`, `corral_webhook_*`, `corral_notifications_total`, `corral_breaker_state` (with the
plugins that own them).
"""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families
from tests.limits import within

from corral.events.consumers import Subscriber
from corral.ids import new_id
from corral.metrics.histogram import Histogram
from corral.plugin import Metric, Plugin, hookimpl
from corral.testing.kit import Kit
from corral_core.health.routes import health
from corral_core.health.service.scrape import to_openmetrics

pytestmark = pytest.mark.one_engine

REPOSITORY = Path(__file__).parents[3]
PAGES = REPOSITORY / "docs" / "contract"
OWNED_BY_NO_PAGE = {"corral_up"}  # the page names it in a sentence, with a value of its label


def named_on_pages() -> dict[str, set[frozenset[str]]]:
    """The metrics that the pages name as available, with the labels that they write at the name."""
    sources = [path for part in ("kernel", "plugins") for path in (REPOSITORY / part).rglob("*.py")]
    hooks = {name for path in sources for name in re.findall(r"def (corral_\w+)\(", path.read_text("utf-8"))}
    found: dict[str, set[frozenset[str]]] = {}
    for page in sorted(PAGES.glob("*.md")):
        for section in page.read_text("utf-8").partition("\n## Not available yet")[0].split("\n## "):
            if page.stem in ("health-metrics", "operations") or "metrics" in section.partition("\n")[0].lower():
                for name, labels in re.findall(r"`(corral_\w+)(?:\{([\w,]+)\})?`", section):
                    if name not in hooks:
                        found.setdefault(name, set()).add(frozenset(labels.split(",")) - {""})
    return found


MOST_SERIES = 2000


async def scrape(kit: Kit) -> str:
    answer = await kit.client.get("/metrics", root=True)
    assert answer.status == 200
    return answer.body.decode()


async def settled(kit: Kit) -> str:
    """With what is read from the database: on a busy machine a reading takes longer than a scrape waits."""
    text = await scrape(kit)
    async with asyncio.timeout(60):
        while not all(name in text for name in ("corral_event_consumer_lag", "corral_egress_blocked_total")):
            await asyncio.sleep(0.5)
            text = await scrape(kit)
    return text


def series(text: str) -> dict[str, float]:
    """By name with labels, as written."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def test_health_metrics_6_the_text_is_prometheus_and_every_name_is_there(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(jobs=True)
    await kit.as_user("admin")
    text = await settled(kit)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    typed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE corral_")}
    named = named_on_pages()
    assert named.keys() ^ (typed - OWNED_BY_NO_PAGE) == set()
    labels: dict[str, set[str]] = {name: set() for name in typed}
    for name, family in families.items():
        own = {label for sample in family.samples for label in sample.labels} - {"le"}
        labels[name if name in typed else f"{name}_total"] = own
    observed = {name: own for name, own in labels.items() if own and name in named}
    assert {name: own for name, own in observed.items() if frozenset(own) not in named[name]} == {}
    assert all(family.documentation for family in families.values())


COUNTED = ("_bucket", "_count", "_sum")
ABBREVIATIONS = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
OTHER_UNITS = {"milliseconds", "microseconds", "minutes", "hours", "days", "kilobytes", "megabytes", "gigabytes"}


def lint(text: str) -> list[str]:
    """The rules of `promtool check metrics`, for machines that do not have it."""
    faults, seen = [], set()
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        parts = set(name.split("_"))
        labels = {label for sample in family.samples for label in sample.labels}
        rules = {
            "has no help": bool(family.documentation),
            "comes twice": name not in seen,
            "is declared as another type": f"# TYPE {name} {family.type}" in text,
            "ends in _total but is no counter": family.type == "counter" or not name.endswith("_total"),
            "ends as series of histograms do": not name.endswith(COUNTED),
            "has a type in its name": parts.isdisjoint({"counter", "gauge", "histogram", "summary"}),
            "has an abbreviated or another unit": parts.isdisjoint(ABBREVIATIONS | OTHER_UNITS),
            "is not in snake_case": re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
            "has the label le but no buckets": family.type == "histogram" or "le" not in labels,
            "has the label quantile but is no summary": family.type == "summary" or "quantile" not in labels,
            "has a label that is not in snake_case": all(re.fullmatch("[a-z][a-z0-9_]*", label) for label in labels),
        }
        seen.add(name)
        faults += [f"{name} {fault}" for fault, kept in rules.items() if not kept]
    return faults


async def test_the_text_passes_promtool(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(jobs=True)
    member = await kit.as_user("member")
    asked = {"model": "scripted/echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    assert (await member.post("/llm/chat/completions", asked)).status == 200
    text = await settled(kit)
    assert lint(text) == []
    assert 'corral_llm_first_token_seconds_bucket{le="+Inf",provider="scripted"} 1.0' in text
    if promtool := shutil.which("promtool"):
        run = await asyncio.create_subprocess_exec(promtool, "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=STDOUT)
        told, _ = await run.communicate(text.encode())
        assert (run.returncode, told) == (0, b"")


@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        ("a_seconds_sum", "gauge", "ends as series of histograms do"),
        ("a_total", "gauge", "ends in _total but is no counter"),
        ("a_ms", "gauge", "has an abbreviated or another unit"),
        ("a", "counter", "is declared as another type"),
    ],
)
def test_the_rules_of_promtool_are_kept(name: str, kind: str, fault: str) -> None:
    [found] = lint(f"# HELP {name} Words.\n# TYPE {name} {kind}\n{name} 1\n")
    assert found.endswith(fault)


async def test_open_metrics_by_accept(kit: Kit) -> None:
    await settled(kit)
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    answer = await kit.client.get("/metrics", root=True, headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_open_metrics(answer.body.decode())}
    assert families["corral_http_requests"].type == "counter"
    assert families["corral_http_request_seconds"].type == "histogram"
    assert answer.body.endswith(b"# EOF\n")
    plain = await kit.client.get("/metrics", root=True)
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_open_metrics_are_written_beside_the_event_loop(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def written(text: str) -> str:
        threads.append(threading.current_thread())
        return to_openmetrics(text)

    monkeypatch.setattr(health, "to_openmetrics", written)
    answer = await kit.client.get("/metrics", root=True, headers={"Accept": "application/openmetrics-text"})
    assert answer.status == 200
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_health_metrics_4_the_number_of_series_is_bounded(kit: Kit) -> None:
    """Distinct paths, ids and people; their number is that of a short run."""
    member = await kit.as_user("member")
    await scrape(kit)
    for number in range(300):
        await member.get(f"/tasks/{new_id()}")
        await member.get(f"/nowhere/{number}?x={number}")
        await kit.client.request(f"VERB{number}", f"/tasks/{number}")
    for _ in range(3):
        await kit.as_user("viewer")
    found = series(await scrape(kit))
    assert len(found) <= MOST_SERIES
    assert not [name for name in found if member.user["id"] in name or "nowhere" in name or "VERB" in name]
    assert found['corral_http_requests_total{method="GET",route="unmatched",status="4xx"}'] == 300


async def test_units_and_their_waits_are_counted(kit: Kit) -> None:
    before = series(await scrape(kit))
    await kit.as_user("member")
    after = series(await scrape(kit))
    for name in ("corral_db_transaction_seconds", "corral_db_lock_wait_seconds"):
        assert after[f"{name}_count"] > before.get(f"{name}_count", 0)
        assert after[f'{name}_bucket{{le="+Inf"}}'] == after[f"{name}_count"]
        assert after[f"{name}_sum"] > 0
    assert after["corral_loop_lag_seconds"] >= 0
    assert after["corral_db_pool_in_use"] >= 0


async def test_consumers_tell_how_far_behind_they_are(make_kit: Callable[..., Any]) -> None:
    """Events to which a consumer does not subscribe are nothing to do, although its cursor does not pass them."""
    kit = await make_kit(jobs=True)
    await kit.as_user("admin")
    assert len(await kit.events()) > 0
    found = {name: value for name, value in series(await settled(kit)).items() if "consumer_lag" in name}
    assert found
    assert not [name for name in found if 'consumer="other"' in name]
    assert set(found.values()) == {0}


async def test_calls_of_subscribers_are_counted(make_kit: Callable[..., Any]) -> None:
    class ListenerPlugin(Plugin):
        """Listens."""

        name = "listener"

        @hookimpl
        def corral_subscribers(self) -> list[Subscriber]:
            return [Subscriber("listener.users", ("user.*",), lambda event: None)]

    kit = await make_kit(plugins=["admin", ListenerPlugin], jobs=True)
    await kit.as_user("member")
    label = 'corral_plugin_call_seconds_count{plugin="listener",hook="corral_subscribers"}'
    async with asyncio.timeout(60):
        while not series(await scrape(kit)).get(label):  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.05)


async def test_a_plugin_may_count_in_buckets(make_kit: Callable[..., Any]) -> None:
    waits = Histogram((0.1, 1.0))

    class TimedPlugin(Plugin):
        """Times."""

        name = "timed"

        @hookimpl
        def corral_metrics(self) -> list[Metric]:
            labels = {"kind": ("a", "b")}
            return [Metric(name="timed_seconds", help="Waits.", kind="histogram", labels=labels, collect=waits.read)]

    kit = await make_kit(plugins=[TimedPlugin])
    for seconds, kind in ((0.05, "a"), (0.1, "a"), (0.5, "a"), (7.0, "a"), (0.2, "x"), (0.3, "y")):
        waits.observe(seconds, (kind,))
    found = {name: value for name, value in series(await settled(kit)).items() if name.startswith("timed_seconds")}
    assert found == {
        'timed_seconds_bucket{kind="a",le="0.1"}': 2,
        'timed_seconds_bucket{kind="a",le="1.0"}': 3,
        'timed_seconds_bucket{kind="a",le="+Inf"}': 4,
        'timed_seconds_count{kind="a"}': 4,
        'timed_seconds_sum{kind="a"}': 7.65,
        'timed_seconds_bucket{kind="other",le="0.1"}': 0,
        'timed_seconds_bucket{kind="other",le="1.0"}': 2,
        'timed_seconds_bucket{kind="other",le="+Inf"}': 2,
        'timed_seconds_count{kind="other"}': 2,
        'timed_seconds_sum{kind="other"}': 0.5,
    }


@pytest.mark.parametrize("values", [{("a",): 1}, {(): "many"}, {(): None}, {(): 10**400}])
@pytest.mark.parametrize("kind", ["gauge", "counter", "histogram"])
async def test_a_metric_with_wrong_values_is_left_out(make_kit: Callable[..., Any], kind: Any, values: Any) -> None:
    class OddPlugin(Plugin):
        """Gives one wrong metric and a right one."""

        name = "odd"

        @hookimpl
        def corral_metrics(self) -> list[Metric]:
            return [
                Metric(name="odd_wrong", help="Wrong.", kind=kind, collect=lambda: values),
                Metric(name="odd_right", help="Right.", collect=lambda: {(): 1}),
            ]

    found = series(await settled(await make_kit(plugins=[OddPlugin])))
    assert found["odd_right"] == 1
    assert not [name for name in found if name.startswith("odd_wrong")]


async def test_health_metrics_1_without_the_database(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit()
    admin = await kit.as_user("admin")
    assert (await admin.get("/settings/health")).status == 200
    await asyncio.to_thread(kit.kernel.database.close)

    def gone() -> None:
        raise OSError("gone")

    kit.kernel.database.ping = gone
    await asyncio.sleep(1.1)  # an answer is kept for a second
    ready = await kit.client.get("/health/ready")
    assert (ready.status, ready.json()["checks"]["database"]) == (503, False)
    document = (await kit.client.get("/openapi.json")).json()
    told = document["paths"]["/health/ready"]["get"]["responses"]["503"]["content"]
    assert {ready.headers["content-type"], "application/problem+json"} <= told.keys()
    async with within(0.5):  # 20 ms on a machine that is not busy
        assert (await kit.client.get("/health")).status == 200
    async with within(1):  # 100 ms
        found = series(await scrape(kit))
    assert found['corral_up{dependency="database"}'] == 0
