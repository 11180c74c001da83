"""`corral new-plugin` writes a distribution that passes everything as it is, and `corral check` finds what does not.

Done when, of the page on plugins: 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from corral.scaffold.distribution import InvalidPluginName, placeholder_values, write_distribution
from corral.testing.conformance import check_plugin
from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import ServerProcess

ROOT = Path(__file__).parents[3]
FILES = {
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    ".gitignore",
    "tests/test_echo.py",
    "corral_echo/__init__.py",
    "corral_echo/plugin.py",
    "corral_echo/api.py",
    "corral_echo/models.py",
    "corral_echo/service.py",
    "corral_echo/routes.py",
    "corral_echo/py.typed",
    "corral_echo/migrations/0001_initial.py",
}


OPTIONAL_SETTING = """\
\"\"\"A setting whose value may be absent.\"\"\"

from __future__ import annotations

from corral.plugin import Setting, Settings

URL = Setting(name="echo.url", kind=str, default=None, title="Address of the service")


def host(settings: Settings) -> str:
    return (settings.get(URL) or "http://localhost").partition("//")[2]


def declared() -> Setting[str | None]:
    return URL
"""


@pytest.fixture
def echo(corral: Any) -> Any:
    """A written plugin `echo`, installed in the folder of plugins but not enabled."""
    done = corral("new-plugin", "echo", "--json")
    assert done.status == 0, done
    corral.plugins.add_distribution("echo", corral.home / "corral-echo")
    corral.configure(f'[plugins]\ndir = "{corral.plugins.path}"\n')
    return corral


def test_plugins_1_a_new_plugin_is_green_and_answers_once_enabled(echo: Any) -> None:
    report = echo("check", "echo", "--json")
    assert report.status == 0, report
    assert {finding["rule"] for finding in report.json()["findings"]} >= {"purge.sqlite", "routes.guarded"}
    environ = {"CORRAL_CONFIG": str(echo.home / "corral.toml")}
    with ServerProcess(echo.home, environ=environ) as server:
        assert server.client().get("/echo").status_code == 404
    done = echo("plugins", "enable", "echo")
    assert (done.status, done.err) == (0, ""), done
    with ServerProcess(echo.home, environ=environ) as server:
        admin = server.sign_in()
        assert admin.post("/echo", json={"text": "Hello"}).status_code == 201
        assert [note["text"] for note in admin.get("/echo").json()["items"]] == ["Hello"]
        assert {"get", "post"} <= set(admin.get("/openapi.json").json()["paths"]["/api/v1/echo"])
        assert admin.get("/plugins/echo").json()["state"] == "active"
        _check_run(echo, server.address, admin.headers["Authorization"].removeprefix("Bearer "))


def test_enabling_a_plugin_warns_of_the_rules_that_it_breaks(echo: Any) -> None:
    path = echo.plugins.path / "corral_echo" / "service.py"
    path.write_text(
        path.read_text()
        .replace("Note.select().where(visible(Note, by))", "Note.select()")
        .replace("from corral.auth.visibility import visible\n", "")
    )
    done = echo("plugins", "enable", "echo")
    assert (done.status, "echo is enabled" in done.out) == (0, True), done
    told, rule = done.err.splitlines()
    assert told.startswith("warning: echo breaks rules of the plugin contract, as `corral check echo` shows;")
    assert rule.startswith("  lists.visible: GET /echo lists objects"), done


def _check_run(corral: Any, address: str, token: str) -> None:
    """`corral plugins run` runs a schedule on the server, and names the schedules if it does not know one."""
    environ, command = {"CORRAL_URL": address, "CORRAL_TOKEN": token}, ("plugins", "run", "echo")
    done = corral(*command, "echo.delete_old_notes", environ=environ)
    assert (done.status, "(at 03:30 UTC)" in done.out) == (0, True), done
    told = corral(*command, "echo.delete_old_notes", "--json", environ=environ).json()
    assert (told["running"], told["error"], told["next_at"][11:16]) == (False, None, "03:30")
    unknown = corral(*command, "echo.tick", environ=environ)
    assert (unknown.status, "its schedules are echo.delete_old_notes" in unknown.err) == (1, True), unknown


def test_it_passes_lint_format_types_and_its_own_tests(corral: Any) -> None:
    """ruff and mypy run where they are installed: the environments for lint and types have them, this suite may not."""
    folder = corral.home / "corral-echo"
    write_distribution("echo", folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    (folder / "corral_echo" / "optional.py").write_text(OPTIONAL_SETTING)
    environ = {**corral.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    commands = [["-m", "pytest", "-q", "-p", "no:cacheprovider"]]
    if _has("ruff"):
        commands += [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]]
    if _has("mypy"):
        environ["MYPYPATH"] = str(ROOT / "kernel")
        commands += [["-m", "mypy", "--follow-imports=silent", "--cache-dir", os.devnull]]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environ, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_names_are_checked_and_nothing_is_overwritten(corral: Any, tmp_path: Path) -> None:
    assert placeholder_values("corral-two-words") == {
        "name": "two_words",
        "hyphenated": "two-words",
        "package": "corral_two_words",
        "title": "Two words",
        "camel": "TwoWords",
    }
    for name in ("9lives", "Two", "a--b", "a_", "class", "a" * 31, "", "é", "a/b", ".."):
        with pytest.raises(InvalidPluginName):
            placeholder_values(name)
    assert "already installed" in corral("new-plugin", "agents").err
    assert corral("new-plugin", "../x").status == 2
    (tmp_path / "corral-echo").mkdir()
    done = corral("new-plugin", "echo")
    assert (done.status, "exists" in done.err, list((tmp_path / "corral-echo").iterdir())) == (1, True, [])


def test_the_build_of_a_new_plugin_gives_no_warning(tmp_path: Path) -> None:
    """Setuptools warns of a folder with code that is not listed as a package."""
    root = tmp_path / "corral-echo"
    write_distribution("echo", root)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(root) for path in root.rglob("*.py")} - {Path("tests")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders}


def with_hook(wants: str, hook: str, imports: str, items: str) -> str:
    """The name of the plugin, followed by what it wants and by a hook."""
    return f"""    name = "echo"
    wants = ({wants!r},)

    @hookimpl
    def {hook}(self):
        from {imports}

        return [{items}]

"""


# what is changed in which file of the written plugin -> (old, new, the rule that is broken, a part of what it says)
CHANGES = {
    "permission": (
        "plugin.py",
        'Permission("echo.write"',
        'Permission("tasks.write"',
        "manifest.permissions",
        "begin with echo.",
    ),
    "undeclared event": ("plugin.py", "return [NoteWritten]", "return []", "events.declared", "NoteWritten"),
    "undeclared model": ("plugin.py", "return [Note]", "return []", "models.declared", "Note"),
    "hook name": (
        "plugin.py",
        "def corral_metrics",
        "def corral_metrix",
        "hooks.names",
        "corral_metrix: there is no such hook",
    ),
    "unmarked hook": (
        "plugin.py",
        "    @hookimpl\n    def corral_metrics",
        "    def corral_metrics",
        "hooks.names",
        "@hookimpl",
    ),
    "docstring": ("routes.py", '    """List notes."""\n', "", "start.sqlite", "the handler has no docstring"),
    "unknown right": ("routes.py", 'needs="echo.read"', 'needs="echo.raed"', "start.sqlite", "echo.raed"),
    "lax shape": (
        "api.py",
        "class NewNote(msgspec.Struct, kw_only=True, forbid_unknown_fields=True)",
        "class NewNote(msgspec.Struct, kw_only=True)",
        "shapes.strict",
        "NewNote",
    ),
    "shape": ("api.py", "    created_by: str | None", "    created_by: complex | None", "start.sqlite", "complex"),
    "setting": (
        "service.py",
        'name="echo.max_length"',
        'name="ecco.max_length"',
        "settings.names",
        "must begin with echo.",
    ),
    "default": ("service.py", "default=1000", "default=0", "settings.defaults", "a whole number from 1"),
    "table": (
        "models.py",
        'table_name = "echo_notes"',
        'table_name = "notes"',
        "start.sqlite",
        "must begin with echo_",
    ),
    "forgotten column": (
        "models.py",
        "    text = peewee.TextField()",
        "    text = peewee.TextField()\n    tone = peewee.TextField()",
        "migrations.sqlite",
        "add column echo_notes.tone",
    ),
    "forgotten index": (
        "models.py",
        '        indexes = ((("created_at", "id"), False),)\n',
        "",
        "migrations.sqlite",
        "drop index",
    ),
    "other null": (
        "models.py",
        "created_by = IdField(null=True)",
        "created_by = IdField()",
        "migrations.sqlite",
        "created_by is VARCHAR(36) in the database and VARCHAR(36) NOT NULL in the model",
    ),
    "other type": (
        "models.py",
        "text = peewee.TextField()",
        "text = peewee.CharField(max_length=9)",
        "migrations.sqlite",
        "echo_notes.text is TEXT NOT NULL",
    ),
    "inner kernel": (
        "service.py",
        "from corral import clock",
        "from corral import clock, config  # noqa",
        "imports.kernel",
        "service.py:8 imports corral.config",
    ),
    "other plugin": (
        "service.py",
        "from corral import clock",
        "from corral import clock\nfrom corral_plugins.agents.api import Agents",
        "imports.plugins",
        "add agents to requires or wants",
    ),
    "not its api": (
        "service.py",
        "from corral import clock",
        "from corral import clock\nfrom corral_plugins.agents.models import Agent",
        "imports.plugins",
        "only corral_plugins.agents.api",
    ),
    "migration": (
        "migrations/0001_initial.py",
        "    db.create_tables([Note])",
        "    raise OSError('no luck')",
        "start.sqlite",
        "no luck",
    ),
    "absent": (
        "plugin.py",
        '    name = "echo"\n',
        '    name = "echo"\n    requires = ("absent",)\n',
        "manifest.requires",
        "absent is not installed",
    ),
    "unknown want": (
        "plugin.py",
        '    name = "echo"\n',
        '    name = "echo"\n    wants = ("taks",)\n',
        "manifest.wants.known",
        "wants contains taks",
    ),
    "list of all rows": (
        "service.py",
        "Note.select().where(visible(Note, by))",
        "Note.select()",
        "lists.visible",
        "GET /echo lists objects",
    ),
    "unknown event": (
        "plugin.py",
        '    name = "echo"\n',
        with_hook(
            "tasks",
            "corral_subscribers",
            "corral.events.consumers import Subscriber",
            'Subscriber("echo.failures", ("task.fail",), lambda event: None)',
        ),
        "subscribers.events",
        "echo.failures: no installed plugin has the event task.fail; did you mean task.failed?",
    ),
    "event of another plugin": (
        "plugin.py",
        '    name = "echo"\n',
        with_hook(
            "settings",
            "corral_subscribers",
            "corral.events.consumers import Subscriber",
            'Subscriber("echo.failures", ("task.failed",), lambda event: None)',
        ),
        "subscribers.events",
        "echo.failures: task.failed is an event of tasks; add tasks to requires or wants",
    ),
    "tool without a dot": (
        "plugin.py",
        '    name = "echo"\n',
        with_hook(
            "tools",
            "corral_tools",
            "corral_plugins.tools.api import Tool",
            'Tool(name="who", title="Who", description="Who is on call.", risk="read", schema={})',
        ).replace("@hookimpl", "@hookimpl(optionalhook=True)"),
        "start.wants",
        "corral_tools contains an invalid item: Expected `str` matching regex",
    ),
    "status": ("routes.py", "status=201", "status=799", "routes.status", "799 is not a status of success"),
    "network": (
        "service.py",
        "from corral import clock",
        "import urllib.request  # noqa\nfrom corral import clock",
        "imports.network",
        "service.py:8 imports urllib.request",
    ),
    "requires": (
        "plugin.py",
        '    name = "echo"\n',
        '    name = "echo"\n    requires = ("echo",)\n',
        "manifest.requires",
        "contains the plugin itself",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_check_finds(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, rule, told = CHANGES[what]
    write_distribution("echo", tmp_path / "corral-echo")
    path = tmp_path / "corral-echo" / "corral_echo" / file
    text = path.read_text()
    assert old in text
    changed = text.replace(old, new)
    if what == "list of all rows":
        changed = changed.replace("from corral.auth.visibility import visible\n", "")
    path.write_text(changed)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    folder = PluginFolder(tmp_path / "plugins")
    folder.add_distribution("echo", tmp_path / "corral-echo")
    sys.path.append(str(folder.path))
    try:
        report = check_plugin(importlib.import_module("corral_echo.plugin").EchoPlugin, plugin_dir=folder.path)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("corral_echo"):
                del sys.modules[name]
    broken = [finding for finding in report.findings if not finding.ok]
    assert not report.ok
    assert any(finding.rule == rule and told in finding.detail for finding in broken), report


async def test_a_sound_plugin_keeps_every_rule_inside_a_loop_and_on_both_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_server: Any
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "contrib" / "corral-hello"))
    from corral_hello.plugin import HelloPlugin

    url = postgres_server.create_database()
    report = check_plugin(HelloPlugin, postgres_url=url)
    assert report.ok, report
    rules = {finding.rule for finding in report.findings}
    assert {"migrations.sqlite", "migrations.postgresql", "purge.postgresql.again"} <= rules
    again = check_plugin(HelloPlugin, postgres_url=url)
    assert [finding.detail for finding in again.findings if not finding.ok] == [
        "the database is not empty; give an empty one, because the checks create and drop tables in it"
    ]
    postgres_server.drop_database(url)
