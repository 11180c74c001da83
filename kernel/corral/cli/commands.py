"""The click group of `corral`, which imports commands lazily, adds plugins' commands and sets exit statuses."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from corral.cli import COMMANDS
from corral.config.model import Config
from corral.config.reader import load as load_config
from corral.errors import Problem, StartupError
from corral.plugin import InstallationConfig
from corral.plugins import discovery
from corral.plugins.discovery import Found

if TYPE_CHECKING:
    from corral.cli.api_client import ApiClient
    from corral.cli.command_kernels import Session
    from corral.cli.status_parts import StatusPart

T = TypeVar("T")

MAX_HELP_CHARACTERS = 200  # characters; click truncates longer help texts, so the limit is high enough to wrap them
FAILED, USAGE, REFUSED, PENDING = 1, 2, 3, 4
CLICK_PREFIX = re.compile(r"^Error: ", re.MULTILINE)
COMMAND_GROUP, STATUS_GROUP = "corral.commands", "corral.status"  # entry points


class LazyGroup(click.Group):
    """A click group that imports a command's module only when the command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(set(_plugin_commands()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            return import_command(cmd_name)
        found = _plugin_commands(cmd_name).get(cmd_name)
        if found is None:
            load_config()  # raises if a fault in the configuration hides the command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if (owner := _disabled_owner(args[0])) is not None:
                from corral.cli.plugins import reason_in_words

                told = f"{error.message.rstrip('.')}; the plugin {owner} is {reason_in_words(owner, 'config')}"
                raise click.UsageError(told, ctx) from None
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}; did you mean {near[0]}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        rows += [
            (name, item.get_short_help_str(MAX_HELP_CHARACTERS)) for name, item in sorted(_plugin_commands().items())
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def import_command(name: str) -> click.Command:
    """Return a built-in command: the function `<module>_command` in its module."""
    module = importlib.import_module(COMMANDS[name][0])
    command: click.Command = getattr(module, f"{module.__name__.rpartition('.')[2]}_command")
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="corral", message="corral %(version)s", help="show the version and exit")
@click.pass_context
def group(context: click.Context) -> None:
    """Corral is a self-hosted control plane for AI agents."""
    context.obj = CommandContext()
    if os.environ.get("NO_COLOR"):
        context.color = False


class CommandContext:
    """The object that plugins' commands receive through the click context.

    Commands call this object to open a session (it implements `corral.plugin.OpenSession`), and use its methods to read
    the configuration and to call hooks without starting a kernel.
    """

    def __call__(self, config_path: Path | None, label: str) -> AbstractContextManager[Session]:
        """Open a session whose kernel uses the installation's own database. `label` names the command."""
        from corral.cli.command_kernels import open_session

        return open_session(config_path, label)

    def read_installation(self) -> InstallationConfig:
        """Return the part of the current folder's configuration that plugins may read."""
        config = _readable_config()
        return InstallationConfig(
            data_dir=config.data_dir, local_model=config.local_model, plugin_dir=config.plugins.dir
        )

    def call_plugin_hooks(self, hook: str, what: str, *arguments: Any) -> Iterator[tuple[str, list[Any]]]:
        """Call a hook of each plugin that implements it, and yield `(plugin, result)`.

        `what` is a plural noun for the results, which is used in error messages.
        """
        return call_plugin_hook(_readable_config(), hook, what, lambda function: list(function(*arguments)))

    def status_functions(self) -> Iterator[tuple[str, Callable[[ApiClient], StatusPart]]]:
        """Yield the name and the function of each section that a plugin adds to `corral status`, sorted by name."""
        points = tuple(metadata.entry_points(group=STATUS_GROUP))
        own = [
            (found, point)
            for found in _callable_plugins(_readable_config())
            for point in _own_entry_points(found, points)
        ]
        for found, point in sorted(own, key=lambda item: item[1].name):
            yield from ((point.name, function) for function in _guarded_call(found, "lines of the status", point.load))


def _readable_config() -> Config:
    try:
        return load_config()
    except StartupError:
        return Config()


def run() -> NoReturn:
    """Run the command and exit. Errors are printed to standard error."""
    try:
        group.main(prog_name="corral", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)  # click begins the message, which may follow the usage, with "Error: "
        click.echo(CLICK_PREFIX.sub("corral: ", shown.getvalue(), count=1), nl=False, err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        status, lines = _error_message(error)
        if not lines:
            raise
        click.echo("\n".join(lines), err=True)
        sys.exit(status)
    sys.exit(0)


def _error_message(error: Exception) -> tuple[int, list[str]]:
    """Return the exit status and the lines of the error message for an exception.

    For an unexpected exception, there are no lines.
    """
    from corral.cli.api_client import ApiClientError, lines_of_faults

    if isinstance(error, ApiClientError):
        return FAILED, [f"corral: {str(error).rstrip('.')}"]
    import peewee

    from corral.database.migrations import MigrationFailed, SchemaTooNew
    from corral.plugins.migrations import MigrationsPending

    if isinstance(error, StartupError):
        return REFUSED, [f"corral: {fault}" for fault in error.faults]
    if isinstance(error, (MigrationsPending, SchemaTooNew)):
        return PENDING, [f"corral: {error}"]
    if isinstance(error, MigrationFailed):
        return FAILED, [f"corral: {error}"]
    if isinstance(error, (peewee.DatabaseError, peewee.InterfaceError)):
        reason = str(error).strip().partition("\n")[0]
        return FAILED, [f"corral: the database cannot be used: {reason}; run `corral doctor` for details"]
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) and error.encoding == "utf-8":
        return USAGE, ["corral: a value that was given or piped is not UTF-8 text"]
    if isinstance(error, OSError) and error.filename is not None:
        return FAILED, [f"corral: {error.filename}: {error.strerror}"]
    if isinstance(error, Problem):
        faults = [(fault.pointer, fault.detail) for fault in error.errors]
        return FAILED, ["corral: " + "\n".join(lines_of_faults(error.detail, error.title, faults))]
    return FAILED, []


def _plugin_commands(wanted: str | None = None) -> dict[str, click.Command]:
    """Return the commands of the plugins that the configuration loads, keyed by name.

    If a plugin declares its commands as entry points in the group `corral.commands`, the plugin is not imported. In
    this case, only the commands are imported, or only the command `wanted` if it is given. Other plugins contribute
    commands with a hook. A plugin that fails to import contributes no commands. If the configuration is invalid, only
    the commands of built-in plugins are returned; when called, they report what is wrong with the configuration.
    """
    commands: dict[str, click.Command] = {}
    points, with_hook = tuple(metadata.entry_points(group=COMMAND_GROUP)), []
    for found in _callable_plugins(_readable_config()):
        own = _own_entry_points(found, points)
        if not own:
            with_hook.append(found)
        for point in own:
            if wanted in (None, point.name):
                commands.update((point.name, command) for command in _guarded_call(found, "commands", point.load))
    if wanted in commands:
        return commands
    for found in with_hook:
        for command in _commands_of_hook(found):
            commands.setdefault(command.name or "", command)
    return commands


def _commands_of_hook(found: Found) -> list[click.Command]:
    """Return the commands that a plugin contributes with the hook `corral_commands`."""
    from corral.hookspecs import corral_commands
    from corral.plugins.hooks import checked_contributions

    contributed = _call_hook(
        found, "corral_commands", "commands", lambda hook: checked_contributions(corral_commands, hook())
    )
    return [command for commands in contributed for command in commands if command.name is not None]


def command_names(found: Found) -> list[str]:
    """Return the names of a plugin's commands. The plugin is imported unless its commands are entry points."""
    own = [point.name for point in _own_entry_points(found, metadata.entry_points(group=COMMAND_GROUP))]
    return sorted(own or [str(command.name) for command in _commands_of_hook(found)])


def _own_entry_points(found: Found, points: Iterable[metadata.EntryPoint]) -> list[metadata.EntryPoint]:
    """Return the entry points whose modules belong to the plugin's package."""
    return [point for point in points if point.module.startswith(f"{found.module.rpartition('.')[0]}.")]


def call_plugin_hook(config: Config, hook: str, what: str, call: Callable[[Any], T]) -> Iterator[tuple[str, T]]:
    """Yield `(plugin, call(hook))` for each plugin that implements the hook.

    If a plugin fails, a message on standard error says which results are missing; `what` is a plural noun for them,
    such as "commands". The hook is called only for plugins that are built in, that the configuration enables, or that
    belong to one of Corral's extras. Plugins from extras do not have to be enabled.
    """
    for found in _callable_plugins(config):
        yield from ((found.name, item) for item in _call_hook(found, hook, what, call))


def _callable_plugins(config: Config) -> Iterator[Found]:
    ours = distributions_of_extras()
    for found in discovery.discover(config):
        known = found.built_in or found.name in config.plugins.enabled or found.distribution in ours
        if known and found.name not in config.plugins.disabled:
            yield found


def _disabled_owner(command: str) -> str | None:
    """Return the name of the installed but disabled plugin that a command seems to belong to, or None.

    Such a plugin is not imported. Only its entry points and its name indicate which commands it has.
    """
    config = _readable_config()
    enabled = {found.name for found in _callable_plugins(config)}
    points = [point for point in metadata.entry_points(group=COMMAND_GROUP) if point.name == command]
    for found in discovery.discover(config):
        package = f"{found.module.rpartition('.')[0]}."
        is_owner = found.name == command or any(point.module.startswith(package) for point in points)
        if is_owner and found.name not in enabled:
            return found.name
    return None


def distributions_of_extras() -> frozenset[str]:
    """Return the names of the distributions that Corral's extras, such as `corral[local]`, install.

    These distributions are released separately from Corral, but Corral trusts them.
    """
    try:
        requirements = metadata.requires(discovery.BUILT_IN) or []
    except metadata.PackageNotFoundError:  # an uninstalled source tree
        return frozenset()
    named = (re.match(r"[\w.-]+", line) for line in requirements if "extra ==" in line)
    return frozenset(match[0].lower() for match in named if match is not None)


def _call_hook(found: Found, hook: str, what: str, call: Callable[[Any], T]) -> list[T]:
    def call_plugin() -> list[T]:
        function = getattr(found.load()(), hook, None)
        return [call(function)] if function is not None else []

    return [item for items in _guarded_call(found, what, call_plugin) for item in items]


def _guarded_call(found: Found, what: str, function: Callable[[], T]) -> list[T]:
    """Call a function of a plugin, and return its result in a list.

    If the function fails, print a message and return an empty list.
    """
    try:
        return [function()]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin must not end the command
        click.echo(f"corral: the plugin {found.name} failed, so its {what} are missing: {error}", err=True)
        return []
