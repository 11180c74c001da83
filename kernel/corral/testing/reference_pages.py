"""Generates reference pages from the declarations of the kernel and the built-in plugins.

Run `python -m corral.testing.reference_pages --write` at the root of the source tree to update the pages.
"""

from __future__ import annotations

import inspect
import itertools
import json
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from corral.asgi.application import Application
from corral.config.model import TABLE, ConfigField
from corral.errors import CODES
from corral.events.event import EventType
from corral.metrics.requests import RequestMetrics
from corral.plugin import Metric, Plugin, Setting
from corral.settings.validation import type_of_setting, unwrap_type
from corral.testing.generator_command import main, temporary_application
from corral.testing.markdown import table
from corral.testing.plugin_api_reference import api_pages

FOLDER = Path("docs", "reference")
_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
}
SETTINGS = """\
# Run-time settings

Every setting that a built-in plugin declares, by category. A value in `corral.toml` or the environment pins a setting:
then it cannot be changed at run time.
"""
EVENTS = """\
# Events

Every event that a built-in plugin emits. Visibility: `shared` events are seen by everyone but auditors, `private` ones
by the owner of the object, `private_and_admin` ones by the owner and admins, `admin` ones by admins.

The last column names the class of the payload, which other plugins import from the `api` module of the plugin, or from
the public module of the kernel. A subscriber reads the payload of a logged event with it:

```python
import msgspec
from corral.events.log import LoggedEvent
from corral_plugins.tasks.api import TaskCompleted


def remember(event: LoggedEvent) -> None:
    completed = msgspec.json.decode(event.data, type=TaskCompleted)
```
"""
COMMANDS = """\
# Commands

Every command of `corral`, including those of plugins, with its options. Each command also takes `--help`.
Exit statuses: 0 done, 1 failed, 2 wrong usage, 3 refused to start, 4 migrations are pending or newer than the code.
A plugin [adds commands](../how-to/write-a-plugin.md#add-a-command) with the `corral_commands` hook.
"""
CONFIGURATION = """\
# Configuration

Every key of `corral.toml` with the variable that overrides it. The command line wins over the environment, the
environment over the file, and the file over the default. `corral config init PATH` writes a commented file, and
`corral config show` prints the effective values. Run-time settings: [settings.md](settings.md).

The file is the one that `--config` or the variable `CORRAL_CONFIG` names, otherwise the first of `./corral.toml` and
`/etc/corral/corral.toml` that exists. `allowed_hosts`, `trusted_proxies`, `allow`, `enabled` and `disabled` are lists
of strings, or one string with commas between the items, as in a variable. A test passes keys to the kit, for example
`config={"egress.allow": ["127.0.0.1:9000"]}`.

A plugin declares its section `[plugins.<name>]` as the type `config` of its class. The fields of this type are the
keys, an unknown key makes the plugin `failed`, and no variable overrides them. What may change while Corral runs, or
needs a variable, is a setting, as [Write a plugin](../how-to/write-a-plugin.md) shows.
"""
ERRORS = """\
# Error codes

Every error response is a problem document (RFC 9457) with a stable `code`. A server explains each code at
`/problems/<code>`. The last column names the plugins whose routes may answer with the code, or says that every route
may. The kernel raises the remaining codes on behalf of any route or plugin.
"""
METRICS = """\
# Metrics

Every metric of `/metrics` with its labels.
"""


def generated_files(folder: Path = FOLDER) -> dict[Path, str]:
    """Return the content of all generated pages, keyed by path."""
    root = folder.resolve().parents[1]
    with temporary_application() as application:
        kernel = application.kernel
        plugins = [item.plugin for item in kernel.plugins if item.found.built_in and item.plugin is not None]
        pages = {
            "settings": settings_reference(item.setting for item in kernel.settings.all()),
            "events": events_page(kernel.event_types.all()),
            "commands": commands_page(plugins),
            "configuration": configuration_page(plugins, (item.setting for item in kernel.settings.all())),
            "errors": errors_page(application),
            "metrics": metrics_page(application),
        }
        return {folder / f"{name}.md": text for name, text in pages.items()} | api_pages(kernel, root, folder)


def settings_reference(settings: Iterable[Setting[Any]]) -> str:
    """Return the page about run-time settings, with one table per category."""
    parts = [SETTINGS]
    for category, members in itertools.groupby(settings, lambda setting: setting.name.partition(".")[0]):
        rows = [
            (f"`{item.name}`", type_in_words(item), _bounds(item), _default(item), _title(item)) for item in members
        ]
        parts += [f"\n## {category}\n\n", table(("Name", "Type", "Bounds", "Default", "Title"), rows)]
    return "".join(parts)


def events_page(kinds: Iterable[EventType]) -> str:
    """Return the events page, which contains one table."""
    rows = [
        (f"`{kind.event}`", kind.title, kind.plugin, f"`{kind.visibility}`", _payload(kind), _payload_class(kind))
        for kind in kinds
    ]
    return EVENTS + "\n" + table(("Event", "Title", "Plugin", "Visibility", "Payload", "Class"), rows)


def commands_page(plugins: Iterable[Plugin]) -> str:
    """Return the commands page, with one section per command in the order of `corral --help`."""
    from corral.cli import COMMANDS as BUILT_IN
    from corral.cli.commands import import_command

    found = [import_command(name) for name in BUILT_IN]
    contributed = [each for plugin in plugins for each in getattr(plugin, "corral_commands", tuple)()]
    found += sorted(contributed, key=lambda each: str(each.name))
    return COMMANDS + "".join(text for each in found for text in _command_section(each, "corral"))


def _command_section(command: click.Command, parent: str) -> Iterator[str]:
    name = f"{parent} {command.name}"
    arguments = [
        each.make_metavar(click.Context(command)) for each in command.params if isinstance(each, click.Argument)
    ]
    yield f"\n## {' '.join([name, *arguments])}\n\n{inspect.cleandoc(command.help or '')}\n"
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    if options:
        yield "\n" + table(("Option", "Meaning"), [(_option_text(each), each.help or "") for each in options])
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from _command_section(each, name)


def _option_text(option: click.Option) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else " " + option.make_metavar(click.Context(click.Command("")))
    return f"`{names}{value}`"


def configuration_page(plugins: Iterable[Plugin], settings: Iterable[Setting[Any]]) -> str:
    """Return the configuration page.

    The page contains one table per section, one table for each plugin that has a section, and the variables that pin
    settings.
    """
    parts = [CONFIGURATION]
    for section, members in itertools.groupby(TABLE.items(), lambda item: item[0].rpartition(".")[0]):
        keys = [_configuration_row(name, entry) for name, entry in members]
        title = f"\n## [{section}]\n\n" if section else "\n## Top level\n\n"
        parts += [title, table(("Key", "Variable", "Default", "Meaning"), keys)]
    for plugin in plugins:
        if plugin.config is not None:
            parts += [f"\n## [plugins.{plugin.name}]\n\n{inspect.cleandoc(plugin.config.__doc__ or '')}\n\n"]
            fields = msgspec.structs.fields(plugin.config)
            parts.append(
                table(("Key", "Default"), [(f"`{each.encode_name}`", _field_default(each)) for each in fields])
            )
    pins = [(f"`{each.env}`", f"`{each.name}`") for each in settings if each.env]
    parts += ["\n## Variables that pin a run-time setting\n\n", table(("Variable", "Setting"), sorted(pins))]
    return "".join(parts)


def _configuration_row(name: str, entry: ConfigField) -> tuple[str, str, str, str]:
    variable = f"`{entry.key.variable}`" if entry.key.variable else ""
    default = (
        "" if entry.default in (None, "", ()) or not isinstance(entry.default, (str, int, tuple)) else entry.default
    )
    shown = f"`{json.dumps(default)}`" if default != "" else ""
    return f"`{name.rpartition('.')[2]}`", variable, shown, entry.key.doc


def _field_default(field: Any) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(msgspec.to_builtins(field.default_factory()))}`"
    return "" if field.default in (msgspec.NODEFAULT, None) else f"`{json.dumps(msgspec.to_builtins(field.default))}`"


def errors_page(application: Application) -> str:
    """Return the error codes page, with one table that is sorted by status."""
    owners: dict[str, set[str]] = defaultdict(set)
    for endpoint in application.endpoints:
        for code in endpoint.route.raises:
            owners[code].add(endpoint.route.plugin)
    from corral_core.plugin_admin.service.openapi_problem_codes import EVERY_ROUTE

    rows = []
    for code, (status, title, remedy) in sorted(CODES.items(), key=lambda item: (item[1][0], item[0])):
        raised = "every route" if code in EVERY_ROUTE else ", ".join(sorted(owners[code])) or "the kernel"
        rows.append((f"`{code}`", str(status), title, remedy, raised))
    return ERRORS + "\n" + table(("Code", "Status", "Meaning", "What to do", "Raised by"), rows)


def metrics_page(application: Application) -> str:
    """Return the metrics page, with one table of all metrics for the process, the installation and the plugins."""
    from corral_core.health.service.scrape import MetricsRenderer

    kernel = application.kernel
    scrape = kernel.container.get(MetricsRenderer)
    _record_sample_values(kernel.metrics)
    registries = (scrape._process, scrape._installation)
    text = "\n".join([*scrape.plugin_lines(), *(generate_latest(each).decode() for each in registries)])
    found = {_full_name(family): _family_row(family) for family in text_string_to_metric_families(text)}
    for item in kernel.active:
        for metric in item.contributions_to("corral_metrics"):
            found[metric.name] = _metric_row(metric)
    rows = [(f"`{name}`", kind, labels, text) for name, (kind, labels, text) in sorted(found.items())]
    return METRICS + "\n" + table(("Metric", "Type", "Labels", "Meaning"), rows)


def _record_sample_values(metrics: RequestMetrics) -> None:
    """Record one value for each metric, because the labels of a metric are visible only after it has a value."""
    metrics.observe("GET", "/", 200, 0.0)
    for counter in (metrics.body_rejected, metrics.plugin_errors, metrics.events):
        counter["x"] += 1


def _full_name(family: Family) -> str:
    return f"{family.name}_total" if family.type == "counter" else str(family.name)


def _family_row(family: Family) -> tuple[str, str, str]:
    labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
    return family.type, ", ".join(f"`{label}`" for label in labels), family.documentation


def _metric_row(metric: Metric) -> tuple[str, str, str]:
    return metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help


def type_in_words(setting: Setting[Any]) -> str:
    """Return a description of the setting's type, such as `list of texts or null`."""
    kind, nullable = type_of_setting(setting)
    if typing.get_origin(kind) is list:
        item, _ = unwrap_type(typing.get_args(kind)[0])
        text = f"list of {_NAMES.get(item, 'text')}s"
    else:
        text = _NAMES.get(kind, "object")
    return f"{text} or null" if nullable else text


def _bounds(setting: Setting[Any]) -> str:
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    least, most = (f"{bound:,.10g}" if bound is not None else "" for bound in (setting.minimum, setting.maximum))
    if least and most:
        return f"{least} to {most}"
    return f"at least {least}" if least else f"at most {most}" if most else ""


def _default(setting: Setting[Any]) -> str:
    return "secret" if setting.secret else f"`{json.dumps(msgspec.to_builtins(setting.default), ensure_ascii=False)}`"


def _title(setting: Setting[Any]) -> str:
    return f"{setting.title} (from the next start)" if setting.restart_required else setting.title


def _payload(kind: EventType) -> str:
    return ", ".join(f"`{field.encode_name}`" for field in msgspec.structs.fields(kind.payload))


def _payload_class(kind: EventType) -> str:
    return f"`{kind.payload.__module__}.{kind.payload.__name__}`"


if __name__ == "__main__":
    main(generated_files)
