"""`corral plugins` edits corral.toml with its comments kept, refuses what would not come up, purges on a typed name."""

from __future__ import annotations

import sqlite3
import tomllib
from typing import Any

import pytest

from corral.cli.enabled_plugins import purge, tables_of
from corral.database.connect import connect
from corral.database.migrations import own_connection

PLUGIN = '''
from corral.plugin import Plugin


class {camel}Plugin(Plugin):
    """A {name}."""

    name = "{name}"
    requires = {requires}
'''
MIGRATION = """
def up(migrator, db):
    db.execute_sql("CREATE TABLE {name}_things (id INTEGER PRIMARY KEY)")
"""
FILE = """# The installation of the second floor.
[server]
bind = "127.0.0.1:8123"  # not the usual one

[plugins]  # by and by
dir = "{dir}"
strict = false
enabled = [
    "steady",  # since May
]
"""


@pytest.fixture
def two(corral: Any) -> Any:
    """`steady`, which the file names, and `leaning`, which requires it."""
    for name, requires in (("steady", ()), ("leaning", ("steady",))):
        text = PLUGIN.format(name=name, camel=name.capitalize(), requires=requires)
        corral.plugins.add(name, text, {"migrations/0001_initial.py": MIGRATION.format(name=name)})
    corral.configure(FILE.format(dir=corral.plugins.path))
    return corral


def states(corral: Any) -> dict[str, str]:
    return {row["name"]: row["state"] for row in corral("plugins", "--json").json()["items"]}


def named(corral: Any) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((corral.home / "corral.toml").read_text())["plugins"]
    return found


def test_the_file_is_edited_and_its_comments_stay(two: Any) -> None:
    before = (two.home / "corral.toml").read_text()
    assert (states(two)["steady"], states(two)["leaning"]) == ("active", "disabled")
    done = two("plugins", "enable", "leaning", "--json")
    assert done.json() == {
        "name": "leaning",
        "state": "enabled",
        "file": str(two.home / "corral.toml"),
        "changed": True,
        "reloading": 0,
        "failures": [],
    }, done
    after = (two.home / "corral.toml").read_text()
    assert named(two)["enabled"] == ["steady", "leaning"]
    for comment in ("# The installation of the second floor.", "# not the usual one", "# by and by", "# since May"):
        assert comment in after
    assert states(two)["leaning"] == "active"
    assert not two("plugins", "enable", "leaning", "--json").json()["changed"]
    assert two("plugins", "disable", "leaning").status == 0
    assert named(two)["enabled"] == ["steady"]
    assert set(before.split()) <= set((two.home / "corral.toml").read_text().split()) | {"strict"}


def test_a_built_in_plugin_goes_into_the_list_of_disabled_ones(corral: Any) -> None:
    done = corral("plugins", "disable", "messages")
    assert "the API operations and background jobs of messages stop" in done.err
    assert "its commands are gone (messages)" in done.err
    assert "these plugins continue without it: " in done.err
    assert corral("plugins", "enable", "messages").status == 0
    done = corral("plugins", "disable", "llm")
    assert done.status == 0, done
    assert (corral.home / "corral.toml").read_text() == '[plugins]\ndisabled = ["llm"]\n'
    assert states(corral)["llm"] == "disabled"
    assert "not enabled in corral.toml; enable it: corral plugins enable llm" in corral("plugins").out
    assert corral("plugins", "enable", "llm").status == 0
    assert named(corral) == {"disabled": []}


def test_what_would_break_is_refused_and_the_file_untouched(two: Any) -> None:
    before = (two.home / "corral.toml").read_text()
    broken = {
        "broken": "raise SystemExit(1)",
        "picky": PLUGIN.format(name="picky", camel="Picky", requires=("absent",)),
    }
    for name, text in broken.items():
        two.plugins.add(name, text)
    for arguments, told in (
        (("enable", "broken"), "SystemExit: 1"),
        (("enable", "picky"), "requires absent, which is not installed; enable absent first"),
        (("enable", "stedy"), "did you mean steady?"),
        (("disable", "accounts"), "protected"),
        (("disable", "nothing-like-it"), "no plugin named nothing-like-it is installed"),
    ):
        done = two("plugins", *arguments)
        assert (done.status, told in done.err) == (1, True), done
    assert (two.home / "corral.toml").read_text() == before
    two("plugins", "enable", "leaning")
    refused = two("plugins", "disable", "steady")
    assert "steady is required by leaning; disable these plugins first" in refused.err
    assert named(two)["enabled"] == ["steady", "leaning"]


def test_one_whose_import_ends_the_process_can_be_taken_out(corral: Any) -> None:
    corral.plugins.add("deadly", "import os\nos._exit(9)\n")
    corral.configure('[plugins]\ndir = "plugins"\nenabled = ["deadly"]\n')
    assert corral("plugins").status == 9
    assert corral("plugins", environ={"CORRAL_SAFE_MODE": "1"}).status == 0
    assert corral("plugins", "disable", "deadly").status == 0
    assert states(corral)["deadly"] == "disabled"


def test_one_that_was_uninstalled_can_be_taken_out_of_the_file(corral: Any) -> None:
    corral.configure('[plugins]\nenabled = ["gone"]\n')
    assert any("gone is enabled but not installed" in line for line in corral("doctor").out.splitlines())
    assert corral("plugins", "disable", "gone").status == 0
    assert named(corral) == {"enabled": []}


def test_what_admins_took_out_by_the_api_comes_back_by_the_file(corral: Any) -> None:
    environ = {"CORRAL_DATA_DIR": str(corral.home / "data")}
    assert corral("migrate", environ=environ).status == 0
    with sqlite3.connect(corral.home / "data" / "corral.db") as connection:
        row = ("llm", "disabled", "too dear", "2026-01-01T00:00:00.000Z")
        connection.execute("INSERT INTO plugin_admin_states (name, state, reason, since) VALUES (?, ?, ?, ?)", row)
    shown = corral("plugins", "show", "llm", "--json", environ=environ).json()
    assert (shown["state"], shown["reason"]) == ("disabled", "too dear")
    assert corral("plugins", "enable", "llm", environ=environ).status == 0
    assert named(corral) == {"enabled": ["llm"]}  # what the file names wins over what the API stored
    assert corral("plugins", "show", "llm", "--json", environ=environ).json()["state"] == "active"


def test_show_tells_all(two: Any) -> None:
    shown = two("plugins", "show", "steady", "--json").json()
    wanted = {
        "state": "active",
        "title": "A steady.",
        "distribution": "corral-steady",
        "version": "1.0",
        "required_by": ["leaning"] if states(two)["leaning"] == "active" else [],
        "migrations": ["0001_initial"],
    }
    assert wanted.items() <= shown.items()
    assert "A steady." in two("plugins", "show", "steady").out


CONTRIBUTING = """
import click
from corral.events.consumers import Subscriber
from corral.plugin import HealthCheck, Metric, Plugin, hookimpl
from corral_plugins.tools.api import Tool


class GivingPlugin(Plugin):
    \"\"\"A plugin that gives.\"\"\"

    name = "giving"
    wants = ("tasks", "tools")

    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("giving.failures", ("EVENT",), lambda event: None)]

    @hookimpl
    def corral_metrics(self):
        return [Metric(name="corral_giving_things", help="Things", collect=dict)]

    @hookimpl
    def corral_health_checks(self):
        return [HealthCheck("giving", lambda: ("ok", "It gives."))]

    @hookimpl
    def corral_commands(self):
        return [click.Command("giving")]

    @hookimpl(optionalhook=True)
    def corral_tools(self):
        return [Tool(name="giving.all", title="All", description="Gives.", risk="read", schema={})]
"""


def test_show_starts_the_plugin_and_lists_what_it_contributes(corral: Any) -> None:
    """The state is the one that the server finds, here that of a subscriber to an event that does not exist."""
    corral.configure(f'[plugins]\ndir = "{corral.plugins.path}"\nenabled = ["giving"]\n')
    folder = corral.plugins.add("giving", CONTRIBUTING.replace("EVENT", "task.failed"))
    shown = corral("plugins", "show", "giving", "--json").json()
    assert shown["state"] == "active", shown
    contributed = {
        "subscribers": ["giving.failures"],
        "metrics": ["corral_giving_things"],
        "health_checks": ["giving"],
        "commands": ["giving"],
        "tools": ["giving.all"],
    }
    assert contributed.items() <= shown.items()
    (folder / "plugin.py").write_text(CONTRIBUTING.replace("EVENT", "task.fail"), "utf-8")
    shown = corral("plugins", "show", "giving", "--json").json()
    assert shown["state"] == "failed"
    assert "unknown event task.fail; fix the name or add its plugin to wants" in shown["reason"]
    assert shown["tools"] == ["giving.all"]


def test_purge_asks_for_the_name_and_drops_the_tables_of_a_disabled_plugin(two: Any) -> None:
    environ = {"CORRAL_DATA_DIR": str(two.home / "data")}
    assert two("migrate", environ=environ).status == 0
    assert (
        "run `corral plugins disable steady` first"
        in two("plugins", "purge", "steady", stdin="steady\n", environ=environ).err
    )
    two("plugins", "disable", "steady", environ=environ)
    wrong = two("plugins", "purge", "steady", stdin="stead\n", environ=environ)
    assert (wrong.status, "no table was dropped" in wrong.err) == (1, True)
    assert two("plugins", "purge", "steady", environ=environ).status != 0  # nobody typed anything
    done = two("plugins", "purge", "steady", "--json", stdin="steady\n", environ=environ)
    assert done.json() == {"name": "steady", "dropped": ["steady_migrations", "steady_things"]}, done
    with sqlite3.connect(two.home / "data" / "corral.db") as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert "accounts_users" in names
    assert not {name for name in names if name.startswith("steady")}
    assert "has no tables" in two("plugins", "purge", "steady", stdin="steady\n", environ=environ).err
    assert "protected" in two("plugins", "purge", "accounts", stdin="accounts\n", environ=environ).err


def test_purge_leaves_neighbours_with_longer_names_and_takes_its_rows_along(database_url: str) -> None:
    database = connect(database_url)
    engine: Any
    try:
        with own_connection(database) as engine:
            for statement in (
                "CREATE TABLE agent_parents (id INTEGER PRIMARY KEY)",
                "CREATE TABLE agent_children (id INTEGER PRIMARY KEY, p INTEGER REFERENCES agent_parents (id))",
                "CREATE TABLE agent_migrations (id INTEGER)",
                "CREATE TABLE agent_memory_items (id INTEGER)",
                "CREATE TABLE agent_memory_migrations (id INTEGER)",
                "CREATE TABLE agents_agents (id INTEGER)",
                "CREATE TABLE kernel_consumers (name VARCHAR(100))",
                "INSERT INTO agent_parents VALUES (1)",
                "INSERT INTO agent_children VALUES (1, 1)",
                "INSERT INTO kernel_consumers VALUES ('agent.follow'), ('agents.follow'), ('agentx')",
            ):
                engine.execute_sql(statement)
        own = ["agent_children", "agent_migrations", "agent_parents"]
        assert tables_of(database, "agent", ["agents"]) == own
        assert purge(database, "agent", ["agents"]) == own
        with own_connection(database) as engine:
            assert sorted(engine.get_tables()) == [
                "agent_memory_items",
                "agent_memory_migrations",
                "agents_agents",
                "kernel_consumers",
            ]
            rows = engine.execute_sql("SELECT name FROM kernel_consumers ORDER BY name").fetchall()
            assert [row[0] for row in rows] == ["agents.follow", "agentx"]
    finally:
        database.close()
