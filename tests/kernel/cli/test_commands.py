"""Every command of the kernel exists, helps, exits as it should, and prints JSON that parses.

Done when, of the page on operations: 8 for the commands that exist; 7 is in `test_doctor.py`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import pytest
from openapi_spec_validator import validate

from corral.cli import COMMANDS
from corral.cli.commands import group

OF_PLUGINS = (
    *("agents", "audit", "cost", "demo", "events", "keys", "kill-switch", "login", "logout", "run", "secrets"),
    *("security", "status", "tasks", "user", "whoami", "worker", "workers"),
)
GROUPS = {
    "agents": ("list", "show", "create", "edit", "start", "stop", "pause", "resume", "versions", "rollback"),
    "tasks": ("list", "show", "create", "watch", "logs", "explain", "cancel", "retry", "answer"),
    "workers": ("list", "show", "approve", "drain"),
    "config": ("show", "check", "init"),
    "user": ("create", "list", "deactivate", "activate", "role", "reset-password"),
    "plugins": ("list", "show", "enable", "disable", "purge"),
}
HEAVY = re.compile(
    r"\b(corral_plugins|boto3|rq|redis|psycopg|peewee|quart|hypercorn|cryptography|httpx2|click|msgspec|asyncio)\b"
)


def test_a_misspelt_command_is_told_the_nearest(corral: Any) -> None:
    for wrong, near in (("sevre", "serve"), ("usr", "user")):
        told = corral(wrong)
        assert told.status == 2
        assert f"did you mean {near}?" in told.err
    assert "did you mean" not in corral("xyzzy").err


def test_every_error_begins_with_the_name_of_the_program(corral: Any) -> None:
    told = corral("config", "show", "--nothing")  # click prints its own errors after the usage
    assert (told.status, told.err.startswith("Usage: corral config show")) == (2, True), told
    assert told.err.splitlines()[-1].startswith("corral: No such option"), told
    failed = corral("plugins", "enable", "nothing")
    assert (failed.status, failed.err.startswith("corral: no plugin named nothing")) == (1, True), failed
    assert corral("config", "show", "--config", "missing").err.startswith("corral: missing: ")


def test_every_server_that_is_offered_is_taken(corral: Any) -> None:
    (offered,) = re.findall(r"--server \[([a-z|]+)\]", corral("serve", "--help").out)
    for name in offered.split("|"):
        told = corral("serve", "--server", name, "--bind", "203.0.113.1:1")  # an address of no machine
        assert told.status == 3
        refused = "corral: server.bind: cannot listen on 203.0.113.1:1"  # a busy machine may log a slow unit after it
        assert any(line.startswith(refused) for line in told.err.splitlines()), told


def test_operations_8_every_command_has_help(corral: Any) -> None:
    told = corral("--help")
    assert told.status == 0, told
    for name, (_, line) in COMMANDS.items():
        assert name in told.out
        assert line in " ".join(told.out.split())  # long lines are wrapped
    script = "import sys; from corral.cli.commands import group\n" + "".join(
        f"group.main({arguments!r}, standalone_mode=False)\n"
        for name in (*COMMANDS, *OF_PLUGINS)
        for arguments in [[name, "--help"], *([name, sub, "--help"] for sub in GROUPS.get(name, ()))]
    )
    # One process for all: group.main returns after --help.
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, env=corral.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS) + len(OF_PLUGINS) + sum(map(len, GROUPS.values()))


def test_help_texts_are_in_one_style() -> None:
    """Commands have sentences with a full stop, options have phrases without."""
    for line in (text for _, text in COMMANDS.values()):
        assert line.endswith("."), line
    for path, command in _tree(group, ()):
        assert command.get_short_help_str(200).endswith("."), path
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, (path, option.name)
                first = option.help.split()[0]
                assert not option.help.endswith("."), (path, option.help)
                assert first[0].islower() or first.isupper(), (path, option.help)


def _tree(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _tree(found, (*path, name))


TELL_JSON = (
    ("config", "show"),
    ("config", "check"),
    ("config", "init"),
    ("user", "list"),
    ("plugins",),
    ("plugins", "list"),
    ("plugins", "show", "accounts"),
    ("migrate", "--plan"),
    ("doctor",),
    ("openapi",),
    ("check", "accounts"),
    ("new-plugin", "echo"),
)
FIRST = {arguments[0]: arguments for arguments in reversed(TELL_JSON)}


@pytest.mark.parametrize("arguments", TELL_JSON, ids=" ".join)
def test_operations_8_json_output_parses(corral: Any, arguments: tuple[str, ...]) -> None:
    """The first of each group has to import what the group needs."""
    if arguments[0] == "user":
        assert corral("migrate").status == 0
    run = corral.anew if FIRST[arguments[0]] == arguments else corral
    done = run(*arguments, "--json")
    assert isinstance(done.json(), dict), done


def test_version_loads_nothing_but_itself(corral: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "corral", "--version"],
        text=True,
        capture_output=True,
        env=corral.environ,
        check=True,
    )
    assert re.fullmatch(r"corral \d+\.\d+\.\d+\S*\n", done.stdout)
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert [name for name in loaded if HEAVY.search(name)] == []
    assert [name for name in loaded if name.startswith("corral")] == ["corral", "corral.cli"]


def test_version_is_fast(corral: Any) -> None:
    """The goal is 150 ms. Processor time does not depend on the load; a slow machine gets three times as much."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert corral.anew("--version").status == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(taken) < 0.45


def test_unknown_words_are_usage_errors(corral: Any) -> None:
    for arguments in (("sereve",), ("user", "creat"), ("plugins", "list", "--jsn"), ("user", "role", "a@b.c", "king")):
        done = corral(*arguments)
        assert (done.status, done.out) == (2, ""), done


def test_a_plugin_that_exits_at_import_does_not_end_other_commands(corral: Any) -> None:
    corral.plugins.add("faulty", "raise SystemExit(7)")
    corral.configure(f'[plugins]\ndir = "{corral.plugins.path}"\nenabled = ["faulty"]\n')
    told = corral("--help")
    assert told.status == 0, told
    assert "the plugin faulty failed, so its commands are missing" in told.err


COMMAND_PLUGIN = '''
import click

from corral.plugin import Plugin, hookimpl


@click.command("wave")
def wave() -> None:
    """Wave at the operator."""
    click.echo("hello")


class WavingPlugin(Plugin):
    """Has a command."""

    name = "waving"

    @hookimpl
    def corral_commands(self):
        return [wave]
'''


def test_commands_of_plugins_that_are_named_exist(corral: Any) -> None:
    corral.plugins.add("waving", COMMAND_PLUGIN)
    corral.configure(f'[plugins]\ndir = "{corral.plugins.path}"\n')
    assert corral("wave").status == 2
    corral.configure(f'[plugins]\ndir = "{corral.plugins.path}"\nenabled = ["waving"]\n')
    assert corral("wave").out == "hello\n"
    assert "Wave at the operator" in corral("--help").out


# -- config


def test_a_faulty_configuration_is_told_by_the_commands_of_plugins_too(corral: Any) -> None:
    corral.configure('[server]\nbindd = "127.0.0.1:8000"\n')
    for arguments in (("user", "list"), ("wave",)):  # one of a built-in plugin, and one that may be another's
        done = corral(*arguments)
        assert (done.status, "unknown key server.bindd; did you mean server.bind?" in done.err) == (3, True), done
    other = corral.home / "other.toml"
    other.write_text(f'data_dir = "{corral.home}/data"\n', "utf-8")
    done = corral("user", "list", "--config", str(other))
    assert (done.status, "there is no installation" in done.err) == (3, True), done


def test_paths_that_cannot_be_looked_at_are_told_in_one_line(corral: Any) -> None:
    """A name that is too long stands for a folder that is locked, which root would not notice."""
    path = f"/{'x' * 300}"
    done = corral("config", "show", environ={"CORRAL_CONFIG": path})
    assert (done.status, done.err) == (3, f"corral: {path}: File name too long\n")
    for arguments in (("user", "list"), ("plugins", "list"), ("migrate", "--plan")):
        done = corral(*arguments, environ={"CORRAL_DATA_DIR": path})
        assert (done.status, done.err) == (1, f"corral: {path}/corral.db: File name too long\n"), done
    done = corral("doctor", environ={"CORRAL_DATA_DIR": path})
    assert (
        done.status,
        "Traceback" in done.err,
        "run `corral doctor` as the user that the server runs as" in done.out,
    ) == (
        1,
        False,
        True,
    )


def test_a_plan_of_migrations_makes_nothing(corral: Any) -> None:
    planned = corral("migrate", "--plan", "--json").json()["items"]
    assert {"plugin": "accounts", "migration": "0001_initial"} in planned
    assert list(corral.home.iterdir()) == [corral.plugins.path]
    assert corral("migrate", "--json").json()["items"] == planned
    assert corral("migrate", "--json").json()["items"] == corral("migrate", "--plan", "--json").json()["items"] == []


def test_config_shows_values_with_sources_and_masks_secrets(corral: Any) -> None:
    path = corral.configure(
        '[server]\nbind = "0.0.0.0:1"\n[settings]\n"tasks.lease_seconds" = 90\n'
        '[plugins.mailer]\npassword = "hunter22"\n'
    )
    secret = "kV9#qX2$wL7!zR4%tN6^bM1&yH8*dF3("
    environ = {
        "CORRAL_BIND": "127.0.0.1:2",
        "CORRAL_JWT_SECRET": secret,
        "CORRAL_DATABASE_URL": "postgresql://a:pw@h/d",
    }
    done = corral("config", "show", "--json", environ=environ)
    rows = {row["key"]: row for row in done.json()["items"]}
    assert (rows["server.bind"]["value"], rows["server.bind"]["source"]) == ("127.0.0.1:2", "CORRAL_BIND")
    assert rows["settings.tasks.lease_seconds"] | {"about": ""} == {
        "key": "settings.tasks.lease_seconds",
        "value": 90,
        "source": str(path),
        "about": "",
        "secret": False,
    }
    assert rows["database.pool_size"]["source"] == "default"
    text = corral("config", "show", environ=environ).out + done.out
    assert [each for each in (secret, "hunter22", "pw@") if each in text] == []
    only = corral("config", "show", "server", "--json").json()["items"]
    assert {row["key"].partition(".")[0] for row in only} == {"server"}


def test_config_check_warns_of_the_section_of_a_plugin_that_is_not_enabled(corral: Any) -> None:
    corral.plugins.add("idle", IDLE)
    corral.configure('[plugins]\ndir = "plugins"\n[plugins.idle]\ncolour = "red"\n')
    done = corral("config", "check", "--json")
    (row,) = done.json()["items"]
    assert (done.status, row["status"]) == (0, "warning")
    assert row["detail"] == (
        "the section [plugins.idle] is ignored, because the plugin idle is not enabled in corral.toml; "
        "enable it: corral plugins enable idle"
    )


def test_a_command_of_a_plugin_that_is_not_enabled_says_so(corral: Any) -> None:
    corral.plugins.add("idle", IDLE)
    corral.configure('[plugins]\ndir = "plugins"\n')
    done = corral("idle")
    assert done.status == 2
    told = (
        "No such command 'idle'; the plugin idle is not enabled in corral.toml; enable it: corral plugins enable idle"
    )
    assert told in done.err
    assert "did you mean tasks?" in corral("taskss").err


IDLE = '''
from corral.plugin import Plugin


class IdlePlugin(Plugin):
    """Idle."""

    name = "idle"
'''


def test_config_check_tells_what_is_wrong(corral: Any) -> None:
    corral.configure('[sever]\nbind = "x"\n[database]\nurl = "mysql://x"\n')
    done = corral("config", "check")
    assert done.status == 3
    assert "corral.toml:1: unknown key" in done.err
    assert "database.url must be sqlite:///… or postgresql://…" in done.err
    corral.configure('[egress]\nallow = ["10.0.0.0/8:443", "a.example/8"]\n')
    done = corral("config", "check")
    assert done.status == 3
    assert "egress.allow: a.example/8: must be host, host:port, CIDR or CIDR:port" in done.err
    corral.configure('[plugins]\nenabled = ["echo"]\n[plugins.accounts]\ncolour = "red"\n[settings]\n"no.such" = 1\n')
    done = corral("config", "check")
    assert done.status == 3  # a start would be refused: accounts takes no configuration
    assert "accounts: [plugins.accounts]" in done.err
    corral.configure('[plugins]\nenabled = ["echo"]\n[plugins.agents]\ncolour = "red"\n[settings]\n"no.such" = 1\n')
    done = corral("config", "check", "--json")
    assert done.status == 1, done
    told = " ".join(row["detail"] for row in done.json()["items"])
    assert "plugin agents is failed: [plugins.agents]" in told
    assert "no plugin echo is installed" in told
    assert "no active plugin has a setting no.such" in told
    corral.configure('[plugins.llm.providers.mine]\nkind = "opnai"\nbase_url = "http://127.0.0.1:9/v1"\n')
    done = corral("config", "check")
    assert done.status == 1
    assert "llm is failed: llm.providers.mine.kind: must be one of anthropic, openai, scripted" in done.out
    corral.configure('[plugins.llm.providers.mine]\nkind = "openai"\nmodels = ["llama3.2"]\n')
    assert (
        "llm.providers.mine: Invalid enum value 'llama3.2' - at `$.models[0]` (a model is {id ="
        in corral("config", "check").out
    )


def test_config_init_writes_a_file_that_is_valid_and_never_overwrites(corral: Any) -> None:
    assert corral("config", "init").status == 0
    path = corral.home / "corral.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert corral("config", "show").status == 0
    path.write_text("# mine\n")
    done = corral("config", "init")
    assert (done.status, path.read_text()) == (1, "# mine\n"), done


# -- openapi


def test_openapi_is_the_same_each_time_valid_and_leaves_nothing(corral: Any) -> None:
    first, second = corral("openapi"), corral("openapi", "--json")
    assert first.out == second.out
    document = json.loads(first.out)
    validate(document)
    assert "/api/v1/auth/login" in document["paths"]
    assert corral("openapi", "--out", "api.json").out == ""
    assert json.loads((corral.home / "api.json").read_text()) == document
    assert sorted(os.listdir(corral.home)) == ["api.json", "plugins"]


def test_openapi_in_yaml_needs_a_library(corral: Any) -> None:
    blocked = corral.home / "blocked"
    blocked.mkdir()
    (blocked / "yaml.py").write_text("raise ImportError('not here')")
    done = corral.anew("openapi", "--yaml", environ={"PYTHONPATH": str(blocked)})
    assert done.status == 2
    assert "pip install pyyaml" in done.err
