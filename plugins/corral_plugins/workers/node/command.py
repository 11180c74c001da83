"""The `corral worker` command."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral_plugins.workers.node.tools.builtin import TOOLS

if TYPE_CHECKING:
    from corral_plugins.workers.node.identity import WorkerFolder
    from corral_plugins.workers.node.tools.mcp import WorkerMcp
    from corral_plugins.workers.node.worker import ReferenceWorker, WorkerOptions

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"  # of the embedded worker; the server parses and formats its lines
EXIT_REFUSED, EXIT_IN_USE = 1, 3


@click.command("worker")
@click.option("--url", required=True, envvar="CORRAL_URL", help="address of the server, such as https://corral.example")
@click.option("--name", help="unique name of the worker (default: the host name)")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="label of the worker; agents can select workers by label; repeatable",
)
@click.option(
    "--max-agents",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="maximum number of tasks that the worker runs at the same time",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file that contains the registration key (default: use the key in CORRAL_WORKER_TOKEN)",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder for the worker's identity and workspaces",
)
@click.option(
    "--allow",
    "allow",
    multiple=True,
    metavar="TOOL",
    callback=lambda context, option, given: _allowed_tools(given),
    help="tool that agents may use on this machine, with the permissions of your user account: "
    f"{', '.join(TOOLS)}; repeatable",
)
@click.option(
    "--mcp",
    "mcp_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file that lists the MCP servers to start on this machine, in the form "
    '{"mcpServers": {"NAME": {"command": "…", "args": […]}}}; agents may use all tools of these servers',
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    envvar="CORRAL_LOG_LEVEL",
    help="minimum level of the log lines to print",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "json", "console"]),
    default="auto",
    show_default=True,
    envvar="CORRAL_LOG_FORMAT",
    help="format of log lines; auto selects console on a terminal and json elsewhere",
)
@click.option("--drain-seconds", type=click.FloatRange(0, 600), default=30.0, hidden=True)
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
def worker_command(
    url: str,
    name: str | None,
    labels: tuple[str, ...],
    max_agents: int,
    token_file: Path | None,
    folder: Path | None,
    allow: tuple[str, ...],
    mcp_file: Path | None,
    log_level: str,
    log_format: str,
    drain_seconds: float,
    until_stdin_closes: bool,
) -> None:
    """Run tasks for a server. SIGTERM, Ctrl-C or SIGHUP releases the running tasks and stops the worker; a second
    signal stops it immediately.

    The worker registers with a registration key and stores its identity in its folder. The folder also contains one
    workspace per task, in which the allowed tools run. shell.run and python.run can do anything that the worker's
    operating system user can do, so run the worker as a separate user or in a container.
    """
    import socket

    from corral_plugins.workers.node.identity import WorkerFolder
    from corral_plugins.workers.node.worker import WorkerOptions

    name = name or socket.gethostname()
    if any("\ud800" <= character <= "\udfff" for character in "".join((name, *labels))):
        raise click.UsageError("--name and --label must be UTF-8 text")
    options = WorkerOptions(
        url=_valid_url(url),
        name=name,
        labels=_parse_labels(labels),
        max_agents=max_agents,
        drain_seconds=drain_seconds,
        key=_registration_key(token_file),
        allow=allow,
    )
    _configure_logging(log_level, log_format, relayed=until_stdin_closes)
    if mcp_file is not None:
        options.mcp = _list_mcp_tools(mcp_file)
    _run_worker(options, WorkerFolder(folder or _default_folder(name)), until_stdin_closes=until_stdin_closes)


def _list_mcp_tools(path: Path) -> WorkerMcp:
    """Start each MCP server in the file once, to list its tools. Exit with status 1 if this fails."""
    import asyncio

    from corral_plugins.workers.node.tools.mcp import McpConfigurationError, list_mcp_tools, read_mcp_file

    try:
        return asyncio.run(list_mcp_tools(read_mcp_file(path)))
    except McpConfigurationError as error:
        click.echo(f"corral: {error}", err=True)
        sys.exit(EXIT_REFUSED)


def _valid_url(text: str) -> str:
    import httpx2

    if not text.startswith(("http://", "https://")):
        raise click.BadParameter("the URL must begin with http:// or https://", param_hint="--url")
    with contextlib.suppress(httpx2.InvalidURL):
        if httpx2.URL(text).host:
            return text.rstrip("/")
    raise click.BadParameter(f"{text} is not a valid URL", param_hint="--url")


def _allowed_tools(given: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if name not in TOOLS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(TOOLS)}")
    return tuple(sorted(set(given)))


def _parse_labels(given: tuple[str, ...]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for item in given:
        key, mark, value = item.partition("=")
        if not mark or not key:
            raise click.BadParameter(f"{item!r} does not have the form KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def _registration_key(token_file: Path | None) -> str | None:
    if token_file is None:
        text, where = os.environ.get("CORRAL_WORKER_TOKEN", ""), "CORRAL_WORKER_TOKEN"
    else:
        text, where = token_file.read_text(encoding="utf-8", errors="replace"), f"--token-file {token_file}"
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise click.UsageError(f"{where}: a registration key must consist of printable ASCII characters")
    return text or None


def _default_folder(name: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    state = Path(base) if base else Path.home() / ".local" / "state"
    return state / "corral" / "workers" / name.replace("/", "_")


def _configure_logging(level: str, form: str, *, relayed: bool) -> None:
    if relayed:
        import logging

        logging.basicConfig(level=level.upper(), format=LOG_FORMAT, stream=sys.stderr)
        logging.getLogger("httpx2").setLevel(logging.WARNING)
    else:
        from corral.cli import logging_setup

        logging_setup.configure(level, form)


def _run_worker(options: WorkerOptions, folder: WorkerFolder, *, until_stdin_closes: bool) -> None:
    """Run the worker until it is drained. Exit with status 3 if its folder is in use, or 1 after other failures."""
    import asyncio

    from corral_plugins.workers.node.identity import FolderInUse, FolderUnusable
    from corral_plugins.workers.node.task_process import ProcessNotStarted
    from corral_plugins.workers.node.worker import ReferenceWorker, WorkerRefused

    try:
        with folder.lock_folder():
            asyncio.run(_serve_until_drained(ReferenceWorker(options, folder), until_stdin_closes=until_stdin_closes))
    except FolderInUse as error:
        click.echo(f"corral: {error}", err=True)
        sys.exit(EXIT_IN_USE)
    except (WorkerRefused, FolderUnusable, ProcessNotStarted) as error:
        click.echo(f"corral: {error}", err=True)
        sys.exit(EXIT_REFUSED)


async def _serve_until_drained(worker: ReferenceWorker, *, until_stdin_closes: bool) -> None:
    import asyncio
    import signal

    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping:
            exit_now()
        stopping = True
        worker.drain()

    def exit_now() -> None:
        worker.kill()
        os._exit(130)

    def watch_parent() -> None:
        if not os.read(0, 4096):
            exit_now()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup sets SIGHUP to be ignored
            loop.add_signal_handler(number, stop)
    if until_stdin_closes:
        loop.add_reader(0, watch_parent)
    await worker.run()
