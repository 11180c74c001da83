"""Conformance checks. The line `assert check_plugin(EchoPlugin).ok` verifies that a plugin complies with the contract.

`manifest_rules` checks the plugin class, and `source_rules` checks the files of its package. `contribution_rules` and
`lifecycle_rules` check the plugin in a real kernel in a temporary folder. This kernel also runs the plugins that the
plugin requires, and a second kernel also runs the plugins in `wants`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from corral.config.model import Config, Plugins
from corral.plugin import Plugin
from corral.plugins.discovery import discover
from corral.testing.database_templates import is_empty
from corral.testing.findings import Finding, Report, rule_findings
from corral.testing.lifecycle_rules import inspect_running, start_with_wants
from corral.testing.manifest_rules import manifest_rules
from corral.testing.source_rules import Package, source_rules


def check_plugin(
    kind: type[Plugin],
    *,
    postgres_url: str | None = None,
    section: dict[str, Any] | None = None,
    plugin_dir: Path | None = None,
) -> Report:
    """Check every rule of the contract and return a report.

    `report.ok` is the result, and `print(report)` shows the details. `postgres_url` is the URL of an empty PostgreSQL
    database, with which the checks that need a running kernel are repeated. `section` is the configuration
    `[plugins.<name>]` that the plugin needs to start. `plugin_dir` is an additional folder of installed plugins.
    """
    findings = list(manifest_rules(kind))
    names = [finding.rule for finding in findings if not finding.ok]
    if {"manifest.class", "manifest.name"} & set(names):  # no other rule can be checked
        return Report(getattr(kind, "name", kind.__name__), findings)
    installed = _installed(plugin_dir)
    required, missing = _with_requirements(kind.requires, kind, installed)
    findings += [Finding("manifest.requires", False, f"{name} is not installed") for name in missing]
    unknown = [name for name in kind.wants if name not in installed]
    detail = (
        "wants contains {}, but no installed plugin has this name; correct it, or install the plugin to check with it"
    )
    findings += rule_findings("manifest.wants.known", (detail.format(name) for name in unknown))
    wanted = [installed[name] for name in kind.wants if name in installed]
    findings += source_rules(kind, Package.of(kind), [*required, *wanted], installed)
    if not missing:
        urls = {"sqlite": None, **({"postgresql": postgres_url} if postgres_url else {})}
        options: dict[str, Any] = {"section": section, "plugin_dir": plugin_dir}
        for engine, url in urls.items():
            findings += _run_in_thread(functools.partial(_inspect_running, kind, required, engine, url=url, **options))
        beside, _ = _with_requirements([*kind.requires, *(item.name for item in wanted)], kind, installed)
        if wanted:
            findings += _run_in_thread(functools.partial(_start_with_wants, kind, beside, **options))
    return Report(kind.name, findings)


def _installed(plugin_dir: Path | None) -> dict[str, type[Plugin]]:
    """Return every installed plugin class that can be imported, keyed by plugin name."""
    found: dict[str, type[Plugin]] = {}
    for item in discover(Config(plugins=Plugins(dir=plugin_dir))):
        try:
            kind = item.load()
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: S112  (another broken plugin does not affect the report)
            continue
        if isinstance(kind, type) and issubclass(kind, Plugin):
            found[item.name] = kind
    return found


def _with_requirements(
    wanted: Iterable[str], kind: type[Plugin], installed: dict[str, type[Plugin]]
) -> tuple[list[type[Plugin]], list[str]]:
    """Return the `wanted` plugins and all plugins that they require, followed by the names of the missing plugins.

    The plugin `kind` itself is excluded.
    """
    names: list[str] = []
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in (*names, kind.name):
            names.append(name)
            waiting += installed[name].requires if name in installed else ()
    missing = [name for name in names if name not in installed]
    return [installed[name] for name in names if name in installed], missing


def _run_in_thread(make: Callable[[], Any]) -> list[Finding]:
    """Run a coroutine function in a thread with its own event loop.

    Tests can therefore call `check_plugin` with or without a running event loop.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found: list[Finding] = pool.submit(lambda: asyncio.run(make())).result()
        return found


async def _inspect_running(
    kind: type[Plugin], required: Iterable[type[Plugin]], engine: str, url: str | None, **options: Any
) -> list[Finding]:
    if url is not None and not is_empty(url):
        detail = "the database is not empty; give an empty one, because the checks create and drop tables in it"
        return [Finding(f"start.{engine}", False, detail)]
    with tempfile.TemporaryDirectory(prefix="corral-check-") as folder:
        try:
            return await inspect_running(Path(folder), kind, required, engine, url=url, **options)
        except Exception as error:  # the kernel itself did not start with the plugin
            return [Finding(f"start.{engine}", False, f"{type(error).__name__}: {error}")]


async def _start_with_wants(kind: type[Plugin], beside: Iterable[type[Plugin]], **options: Any) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="corral-check-") as folder:
        try:
            return await start_with_wants(Path(folder), kind, beside, **options)
        except Exception as error:
            return [Finding("start.wants", False, f"{type(error).__name__}: {error}")]
