"""What `corral_plugins` and third parties may rely on: a faulty plugin stays in its room, and the rest goes on.

Done when, of the page on plugins: 2 and 6 here, 1 in `cli/test_new_plugin.py`, the others in `isolation/`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.database.unit import current
from corral.errors import StartupError
from corral.events.consumers import ConsumerRow
from corral.jobs.job import enqueue
from corral.plugin import Contributions
from corral.plugins.migrations import MigrationsPending
from corral.testing.kit import Kit, make_kernel
from corral.testing.plugin_folder import PluginFolder
from corral_core.accounts.plugin import AccountsPlugin

MakeKit = Callable[..., Awaitable[Kit]]

PLUGIN = """
from __future__ import annotations

import msgspec
import peewee

from corral.auth.principal import PUBLIC, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.http.routes import Routes
from corral.jobs.job import Job
from corral.plugin import Plugin, Provide, Setting, hookimpl
"""
STEADY = """
routes = Routes("/steady", tag="Steady")


@routes.get("/", needs=PUBLIC)
def read_it() -> dict[str, str]:
    \"\"\"Answer.\"\"\"
    return {"steady": "yes"}


class SteadyPlugin(Plugin):
    \"\"\"Goes on.\"\"\"

    name = "steady"

    @hookimpl
    def corral_routes(self):
        return [routes]
"""
LEANING = (
    STEADY.replace("steady", "leaning")
    .replace("Steady", "Leaning")
    .replace('name = "leaning"', 'name = "leaning"\n    requires = ("faulty",)')
)
FAULTY = STEADY.replace("steady", "faulty").replace("Steady", "Faulty")


def body(text: str) -> str:
    """The faulty plugin with more in its class."""
    return PLUGIN + FAULTY + "\n" + "\n".join(f"    {line}" for line in text.strip("\n").splitlines()) + "\n"


# what is wrong -> (its plugin.py, a part of the reason)
BROKEN = {
    "import": (PLUGIN + "import nothing_has_this_name\n" + FAULTY, "No module named 'nothing_has_this_name'"),
    "exit at import": (PLUGIN + "raise SystemExit(3)\n" + FAULTY, "SystemExit: 3"),
    "syntax": ("def (:\n", "SyntaxError"),
    "no plugin": ("class FaultyPlugin:\n    name = 'faulty'\n", "not a subclass"),
    "other name": (
        PLUGIN + FAULTY.replace('name = "faulty"', 'name = "other"'),
        "the name 'other' is invalid or differs",
    ),
    "other kernel": (
        body("kernel_api = 2"),
        "the plugin requires kernel API version 2, but this kernel has 1",
    ),
    "requires no tuple": (body('requires = "core"'), "requires and wants must be tuples"),
    "foreign permission": (body('permissions = (Permission("tasks.read", "Read"),)'), "must begin with 'faulty.'"),
    "constructor": (body("def __init__(self, settings):\n    raise OSError('no luck')"), "OSError: no luck"),
    "unknown hook": (body("@hookimpl\ndef corral_rotues(self):\n    return []"), "corral_rotues"),
    "unknown optional hook": (
        body("@hookimpl(optionalhook=True)\ndef corral_llm_provider(self):\n    return []"),
        "corral_llm_provider",
    ),
    "hook raises": (body("@hookimpl\ndef corral_jobs(self):\n    raise SystemExit('bye')"), "SystemExit: bye"),
    "hook gives no list": (body("@hookimpl\ndef corral_jobs(self):\n    return 'job'"), "corral_jobs returned str"),
    "configuration": (
        body("class C(msgspec.Struct, forbid_unknown_fields=True):\n    size: int = 1\nconfig = C"),
        "[plugins.faulty]",
    ),
    "services in a circle": (
        body("@hookimpl\ndef corral_services(self):\n    return [Provide(One, One), Provide(Two, Two)]")
        + "\n\nclass One:\n    def __init__(self, two: Two) -> None: ..."
        + "\n\n\nclass Two:\n    def __init__(self, one: One) -> None: ...\n",
        "the services ['One', 'Two'] form a cycle",
    ),
    "table of another": (
        body(
            "class T(Model):\n    class Meta:\n        table_name = 'tasks_x'\n"
            "@hookimpl\ndef corral_models(self):\n    return [self.T]"
        ),
        "the name of the table tasks_x must begin with faulty_",
    ),
    "unknown visibility": (
        body(
            "class T(Model):\n    visibility = 'sharde'\n    class Meta:\n        table_name = 'faulty_x'\n"
            "@hookimpl\ndef corral_models(self):\n    return [self.T]"
        ),
        "T: the visibility 'sharde' is not one of private, shared, admin, private_and_admin",
    ),
    "no owner": (
        body(
            "class T(Model):\n    visibility = 'private'\n    class Meta:\n        table_name = 'faulty_x'\n"
            "@hookimpl\ndef corral_models(self):\n    return [self.T]"
        ),
        "model T is private; set owner_field to its owner column",
    ),
    "unknown visibility of an event": (
        body(
            "class E(Event):\n    event = 'faulty.seen'\n    visibility = 'everyone'\n"
            "@hookimpl\ndef corral_events(self):\n    return [self.E]"
        ),
        "E: the visibility 'everyone' is not one of",
    ),
    "unknown event": (
        body(
            "@hookimpl\ndef corral_subscribers(self):\n"
            "    return [Subscriber('faulty.f', ('user.purgde',), lambda event: None)]"
        ),
        "faulty.f: unknown event user.purgde; fix the name or add its plugin to wants",
    ),
    "async subscriber": (
        body(
            "@hookimpl\ndef corral_subscribers(self):\n    async def follow(event) -> None: ...\n"
            "    return [Subscriber('faulty.f', ('user.purged',), follow)]"
        ),
        "faulty.f: handle must not be async",
    ),
    "setting twice": (
        body(
            "@hookimpl\ndef corral_settings(self):\n"
            "    return [Setting(name='jobs.retention_days', kind=int, default=1, title='x')]"
        ),
        "setting jobs.retention_days is also declared by event_log",
    ),
    "service nobody has": (
        body(
            "@hookimpl\ndef corral_jobs(self):\n"
            "    def run(wanted: Faulty) -> None: ...\n    return [Job('faulty.x', run)]"
        ),
        "Faulty",
    ),
    "unknown permission": (
        (PLUGIN + FAULTY).replace("needs=PUBLIC", 'needs="faulty.read"'),
        "`needs` must name known permissions, not faulty.read",
    ),
    "no docstring": ((PLUGIN + FAULTY).replace('    """Answer."""\n', ""), "the handler has no docstring"),
    "argument that no hook has": (
        body("@hookimpl\ndef corral_jobs(self, app):\n    return []"),
        "corral_jobs has the parameters ['app'], which the specification of corral_jobs lacks",
    ),
    "no schema": (
        (PLUGIN + FAULTY).replace("-> dict[str, str]", "-> Plugin"),
        "Plugin",
    ),
    "name in a path": (
        (PLUGIN + FAULTY).replace('@routes.get("/"', '@routes.get("/{someId}"'),
        "GET /faulty/{someId}: path parameters must be lower case, as in {task_id}",
    ),
    "path of a built-in": (
        (PLUGIN + FAULTY).replace('"/faulty"', '"/health"'),
        "GET /health is also declared by health",
    ),
    "start": (body("async def start(self, runtime):\n    raise RuntimeError('will not')"), "RuntimeError: will not"),
    "start exits": (body("async def start(self, runtime):\n    raise SystemExit(1)"), "SystemExit: 1"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFolder]:
    """An empty folder of plugins; the import path and what was imported from it are as before afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield PluginFolder(tmp_path / "plugins")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def options(folder: PluginFolder, *plugins: Any, **config: Any) -> dict[str, Any]:
    return {"plugins": list(plugins), "config": {"plugins.dir": str(folder.path), **config}}


async def check_others(kit: Kit) -> None:
    """Everything but the faulty plugin answers."""
    assert (await kit.client.get("/steady")).status == 200
    assert (await kit.client.get("/health", root=True)).status == 200
    admin = await kit.as_user("admin")
    assert (await admin.get("/auth/me")).status == 200
    assert (await admin.get("/openapi.json")).status == 200


@pytest.mark.parametrize("what", BROKEN)
async def test_plugins_2_a_broken_plugin_fails_alone(folder: PluginFolder, tmp_path: Path, what: str) -> None:
    text, reason = BROKEN[what]
    folder.add("faulty", text)
    folder.add("steady", PLUGIN + STEADY)
    folder.add("leaning", PLUGIN + LEANING)
    section = {"plugins.faulty": {"colour": "red"}} if what == "configuration" else {}
    async with make_kernel(tmp_path, **options(folder, "faulty", "steady", "leaning", **section)) as kit:
        states = {item.name: (item.state, item.reason) for item in kit.kernel.plugins}
        assert states["faulty"][0] == "failed"
        assert reason in (states["faulty"][1] or "")
        assert states["leaning"] == ("blocked", "requires faulty, which is failed")
        assert states["steady"] == ("active", None)
        assert (await kit.client.get("/faulty")).status in (404, 503)
        assert (await kit.client.get("/leaning")).status in (404, 503)
        await check_others(kit)
        admin = await kit.as_user("admin")
        told = (await admin.get("/plugins/faulty")).json()
        assert (told["state"], reason in told["reason"]) == ("failed", True)
        contributed = kit.kernel.container.get(Contributions).for_hook("corral_routes")
        assert "faulty" not in [name for name, _ in contributed]


MIGRATION = """
def up(migrator, db):
    db.execute_sql("CREATE TABLE faulty_things (id INTEGER PRIMARY KEY)")
    raise {error}
"""


@pytest.mark.parametrize("error", ["RuntimeError('half way')", "SystemExit(5)"])
async def test_plugins_2_a_failing_migration_leaves_the_older_schema(
    folder: PluginFolder, make_kit: MakeKit, error: str
) -> None:
    folder.add("faulty", PLUGIN + FAULTY, {"migrations/0001_initial.py": MIGRATION.format(error=error)})
    folder.add("steady", PLUGIN + STEADY)
    folder.add("leaning", PLUGIN + LEANING)
    kit = await make_kit(**options(folder, "faulty", "steady", "leaning"))
    assert (kit.loaded("faulty").state, kit.loaded("leaning").state) == ("failed", "blocked")
    tables = await kit.kernel.database.work(lambda: current().database.engine.get_tables(), read=True)
    assert "faulty_things" not in tables
    await check_others(kit)
    assert await alerts(kit) == [("migration_failed", "critical", "faulty")]


async def test_a_schema_newer_than_a_third_party_plugin_is_its_failure_alone(
    folder: PluginFolder, make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = "def up(migrator, db):\n    pass\n"
    package = folder.add("faulty", PLUGIN + FAULTY, {"migrations/0001_a.py": up, "migrations/0002_b.py": up})
    folder.add("steady", PLUGIN + STEADY)
    assert (await make_kit(**options(folder, "faulty", "steady"))).loaded("faulty").active
    (package / "migrations" / "0002_b.py").unlink()
    kit = await make_kit(**options(folder, "faulty", "steady"))
    assert "0002_b, which this release does not know" in (kit.loaded("faulty").reason or "")
    await check_others(kit)
    (package / "migrations" / "0001_a.py").unlink()
    monkeypatch.setattr(
        "corral.plugins.discovery.BUILT_IN", "corral-faulty"
    )  # a built-in one keeps the process from starting
    with pytest.raises(MigrationsPending, match="does not know"):
        await make_kit(plugins=["faulty"], config={"plugins.dir": str(folder.path)})


async def test_a_subscriber_of_an_absent_plugin_waits_for_it(folder: PluginFolder, tmp_path: Path) -> None:
    """An event cannot be known while a plugin that the subscriber names in `wants` is absent."""
    text = body(
        "wants = ('absent',)\n@hookimpl\ndef corral_subscribers(self):\n"
        "    return [Subscriber('faulty.f', ('absent.seen',), lambda event: None)]"
    )
    folder.add("faulty", text)
    async with make_kernel(tmp_path, **options(folder, "faulty")) as kit:
        assert kit.loaded("faulty").active


async def test_an_unknown_job_is_an_error_of_the_unit(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[]) as kit:
        with pytest.raises(LookupError, match="no active plugin declares the job tasks\\.raep"):
            await kit.kernel.database.work(lambda: enqueue("tasks.raep"))


async def test_plugins_6_what_nobody_named_contributes_nothing(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("stray", (PLUGIN + STEADY).replace("steady", "stray").replace("Steady", "Stray"))
    async with make_kernel(tmp_path, plugins=None, config={"plugins.dir": str(folder.path)}) as kit:
        assert (kit.loaded("stray").state, kit.loaded("stray").reason) == ("disabled", "config")
        assert (await kit.client.get("/stray")).status == 404
        assert "corral_stray.plugin" not in sys.modules


async def test_one_named_in_the_file_is_active(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("steady", PLUGIN + STEADY)
    async with make_kernel(tmp_path, **options(folder, "steady")) as kit:
        assert kit.loaded("steady").active
        assert (await kit.client.get("/steady")).json() == {"steady": "yes"}
        assert "/api/v1/steady" in (await kit.client.get("/openapi.json")).json()["paths"]
        admin = await kit.as_user("admin")
        told = (await admin.get("/plugins/steady")).json()
        facts = {"distribution": "corral-steady", "version": "1.0", "license": "MIT", "author": "A. U. Thor"}
        assert facts.items() <= told.items()


async def test_two_third_parties_with_one_path_fail_both(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("steady", PLUGIN + STEADY)
    folder.add("faulty", PLUGIN + FAULTY)
    folder.add("rival", (PLUGIN + FAULTY).replace('name = "faulty"', 'name = "rival"').replace("FaultyP", "RivalP"))
    async with make_kernel(tmp_path, **options(folder, "faulty", "rival", "steady")) as kit:
        reasons = {name: kit.loaded(name).reason for name in ("faulty", "rival")}
        assert reasons == {
            "faulty": "GET /faulty is also declared by rival",
            "rival": "GET /faulty is also declared by faulty",
        }
        assert (await kit.client.get("/faulty")).status == 404
        await check_others(kit)


async def test_two_distributions_with_one_name_fail(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("steady", PLUGIN + STEADY)
    folder.add("faulty", PLUGIN + FAULTY)
    folder.add("faulty", PLUGIN + FAULTY, distribution="acme-faulty", package="acme_faulty")
    folder.add("tasks", PLUGIN + FAULTY, distribution="acme-tasks", package="acme_tasks")
    async with make_kernel(tmp_path, **options(folder, "faulty", "steady", "tasks")) as kit:
        assert "acme-faulty and corral-faulty both have a plugin faulty" in (kit.loaded("faulty").reason or "")
        assert kit.loaded("tasks").found.built_in  # it keeps its name
        await check_others(kit)


async def alerts(kit: Kit) -> list[tuple[str, str, str]]:
    """The first alerts: kind, severity and plugin."""
    async with asyncio.timeout(60):
        while not (found := [each.payload() for each in await kit.events() if each.type == "system.alert"]):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0.02)
    return [(each["kind"], each["severity"], each["object"]["id"]) for each in found]


@pytest.mark.one_engine
async def test_a_plugin_that_does_not_start_raises_one_alert_an_hour(folder: PluginFolder, make_kit: MakeKit) -> None:
    folder.add("faulty", body("async def start(self, runtime):\n    raise RuntimeError('will not')"))
    folder.add("leaning", PLUGIN + LEANING)
    for _ in range(2):
        kit = await make_kit(**options(folder, "faulty", "leaning"))
        assert await alerts(kit) == [("plugin_failed", "critical", "faulty")]


async def test_a_plugin_that_fails_later_raises_an_alert(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("early", named("early"))
    folder.add("late", named("late"))
    async with make_kernel(tmp_path, **options(folder, "early", "late")) as kit:
        for count, name in enumerate(("early", "late"), 1):
            kit.kernel.registry.change_state(name, "failed", "it lost its table")
            async with asyncio.timeout(60):
                while len(found := await alerts(kit)) < count:  # noqa: ASYNC110  (no event tells)
                    await asyncio.sleep(0.02)
            assert found[-1] == ("plugin_failed", "critical", name)


def named(name: str, *requires: str) -> str:
    text = (PLUGIN + STEADY).replace("steady", name).replace("Steady", name.capitalize())
    return text.replace(f'name = "{name}"', f'name = "{name}"\n    requires = {requires!r}')


async def test_a_circle_of_requires_fails_its_members_and_blocks_who_needs_them(
    folder: PluginFolder, tmp_path: Path
) -> None:
    folder.add("steady", PLUGIN + STEADY)
    for name, requires in {"one": ("two",), "two": ("three",), "three": ("one",), "four": ("one", "steady")}.items():
        folder.add(name, named(name, *requires))
    async with make_kernel(tmp_path, **options(folder, "one", "two", "three", "four", "steady")) as kit:
        assert {kit.loaded(name).state for name in ("one", "two", "three")} == {"failed"}
        assert kit.loaded("one").reason == "the plugins require each other in a cycle: one, three, two"
        assert kit.loaded("four").reason == "requires one, which is failed"
        await check_others(kit)


async def test_strict_stops_at_the_first_failure(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("faulty", BROKEN["import"][0])
    with pytest.raises(StartupError, match="faulty: ModuleNotFoundError"):
        async with make_kernel(tmp_path, **options(folder, "faulty", **{"plugins.strict": True})):
            pass


async def test_one_that_is_enabled_and_not_installed_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_kernel(tmp_path, plugins=["not_there"]) as kit:
        assert (await kit.client.get("/health", root=True)).status == 200
    told = [each for each in caplog.records if "not installed" in each.message]
    assert [vars(each)["plugin"] for each in told] == ["not_there"]
    with pytest.raises(StartupError, match="not_there: corral"):
        async with make_kernel(tmp_path, plugins=["not_there"], config={"plugins.strict": True}):
            pass


async def test_without_core_nothing_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("no keys")

    monkeypatch.setattr(AccountsPlugin, "start", fail)
    with pytest.raises(StartupError, match="accounts: RuntimeError: no keys"):
        async with make_kernel(tmp_path, plugins=[]):
            pass


RAISING = STEADY.replace('return {"steady": "yes"}', 'raise ValueError("secret detail")')


async def test_a_route_that_raises_is_counted_and_names_its_plugin(folder: PluginFolder, tmp_path: Path) -> None:
    folder.add("steady", PLUGIN + RAISING)
    async with make_kernel(tmp_path, **options(folder, "steady")) as kit:
        answer = await kit.client.get("/steady")
        assert (answer.status, answer.code, answer.json()["plugin"]) == (500, "internal", "steady")
        assert b"secret" not in answer.body
        admin = await kit.as_user("admin")
        told = (await admin.get("/plugins/steady")).json()
        assert (told["state"], told["errors_60s"], told["errors_total"]) == ("active", 1, 1)
        assert told["last_error"]["where"] == "GET /steady"
        errors = (await admin.get("/plugins/steady/errors")).json()["items"]
        assert errors[0]["request_id"] == answer.json()["request_id"]


# -- out of service and back

COUNTING = """
class Count(Model):
    name = peewee.CharField(primary_key=True)
    value = peewee.IntegerField()

    class Meta:
        table_name = "counting_counts"


class Counted(Event, kw_only=True):
    \"\"\"It counted.\"\"\"

    event = "counting.counted"


routes = Routes("/counting", tag="Counting")


@routes.post("/", needs=PUBLIC)
def count() -> dict[str, int]:
    \"\"\"Count one on.\"\"\"
    raise_by_one("route")
    emit(Counted(), object=("count", "route"))
    return {row.name: row.value for row in Count.select()}


def raise_by_one(name):
    Count.insert(name=name, value=1).on_conflict(
        conflict_target=[Count.name], update={Count.value: Count.value + 1}
    ).execute()


def follow(event) -> None:
    raise_by_one("event")


class CountingPlugin(Plugin):
    \"\"\"Counts.\"\"\"

    name = "counting"

    @hookimpl
    def corral_routes(self):
        return [routes]

    @hookimpl
    def corral_models(self):
        return [Count]

    @hookimpl
    def corral_events(self):
        return [Counted]

    @hookimpl
    def corral_jobs(self):
        return [Job("counting.once", lambda: raise_by_one("job"))]

    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("counting.follow", ("user.created",), follow)]
"""
COUNTING_MIGRATION = """
from peewee import CharField, IntegerField, Model


def up(migrator, db):
    class Count(Model):
        name = CharField(primary_key=True)
        value = IntegerField()

        class Meta:
            database = db
            table_name = "counting_counts"

    db.create_tables([Count])
"""


@pytest.fixture
async def counting(folder: PluginFolder, make_kit: MakeKit) -> Kit:
    """A plugin of the built-in kind (the file does not name it), with a table, a job and a consumer."""
    folder.add("counting", PLUGIN + COUNTING, {"migrations/0001_initial.py": COUNTING_MIGRATION})
    kit = await make_kit(jobs=True, **options(folder, "counting"))
    assert kit.loaded("counting").active, kit.loaded("counting").reason
    while not await kit.kernel.database.work(ConsumerRow.select().exists, read=True):  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.02)  # a new consumer begins with what comes after it
    return kit


async def until(kit: Kit, wanted: dict[str, int]) -> None:
    """Wait for the counts."""
    for _ in range(3000):
        found = await kit.kernel.database.work(
            lambda: dict(current().connection.execute("SELECT name, value FROM counting_counts").fetchall()), read=True
        )
        if found == wanted:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{found} instead of {wanted}")


async def test_out_of_service_nothing_of_it_runs_and_nothing_is_lost(counting: Kit) -> None:
    kit = counting
    assert (await kit.client.post("/counting")).json() == {"route": 1}
    await kit.as_user("viewer")
    await until(kit, {"route": 1, "event": 1})
    kit.kernel.registry.change_state("counting", "disabled", "test")
    answer = await kit.client.post("/counting")
    assert (answer.status, answer.code) == (503, "plugin_disabled")
    assert int(answer.headers["retry-after"]) > 0
    await kit.as_user("viewer")
    await kit.kernel.database.work(lambda: enqueue("counting.once"))
    await asyncio.sleep(1.5)  # longer than the longest wait of runner and consumers
    await until(kit, {"route": 1, "event": 1})
    kit.kernel.registry.change_state("counting", "active")
    await until(kit, {"route": 1, "event": 2, "job": 1})
    assert (await kit.client.post("/counting")).json() == {"route": 2, "event": 2, "job": 1}


REQUIRE_AGENTS = ["dead_letter", "messages", "tasks", "workers", "workflows"]
"""The plugins that require `agents`, and what requires them."""


async def test_the_api_takes_a_built_in_plugin_out_and_back_across_restarts(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=None, config={"plugins.disabled": REQUIRE_AGENTS})
    admin = await kit.as_user("admin")
    assert (await admin.post("/plugins/accounts/disable", {})).code == "plugin_required"
    assert (await admin.post("/plugins/agents/disable", {"reason": "too many"})).status == 200
    assert (await admin.get("/agents")).code == "plugin_disabled"
    again = await make_kit(plugins=None, config={"plugins.disabled": REQUIRE_AGENTS})
    admin = await again.sign_in("admin1@example.org")
    assert (await admin.get("/plugins/agents")).json()["reason"] == "too many"
    assert (await admin.get("/agents")).status in (404, 503)
    named = await make_kit(plugins=None, config={"plugins.disabled": REQUIRE_AGENTS, "plugins.enabled": ["agents"]})
    assert named.loaded("agents").active  # what the file names wins
    refused = await (await named.sign_in("admin1@example.org")).post("/plugins/agents/disable", {})
    assert refused.code == "setting_locked"
    assert (await admin.post("/plugins/agents/enable", {})).status in (200, 202)


@pytest.mark.one_engine
async def test_only_admins_see_and_turn_plugins(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[])
    member = await kit.as_user("member")
    assert (await member.get("/plugins")).status == 403
    assert (await member.post("/plugins/accounts/disable", {})).status == 403
