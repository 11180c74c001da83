"""`corral worker`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral_plugins.workers.node.tools.names import TOOL_NAMES

if TYPE_CHECKING:
    from corral_plugins.workers.node.node import Node


@click.command("worker")
@click.option("--url", required=True, envvar="CORRAL_URL", help="address of the server: https://corral.example")
@click.option("--name", help="unique name (default: the machine's)")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="for agents that choose workers; repeatable"
)
@click.option("--max-agents", type=click.IntRange(1, 1000), default=1, show_default=True, help="tasks at a time")
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file with the registration key (else CORRAL_WORKER_TOKEN)",
)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="where it keeps its identity")
@click.option(
    "--allow",
    "allow",
    multiple=True,
    metavar="TOOL",
    callback=lambda context, option, given: _allowed(given),
    help=f"let agents use a tool of this machine, with this user's rights: {', '.join(TOOL_NAMES)}; repeatable",
)
@click.option("--drain-seconds", type=click.FloatRange(0, 600), default=30.0, hidden=True)
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
def command(
    url: str,
    name: str | None,
    labels: tuple[str, ...],
    max_agents: int,
    token_file: Path | None,
    folder: Path | None,
    allow: tuple[str, ...],
    drain_seconds: float,
    until_stdin_closes: bool,
) -> None:
    """Do the tasks of a server. SIGTERM, Ctrl-C or SIGHUP gives running tasks back and ends; a second one ends at once.

    The registration key is used once; what it brings is kept in a folder of the worker's own. So are the folders in
    which allowed tools work, one a task. shell.run and python.run can do what this user can: give the worker a user or
    a container of its own.
    """
    import socket

    from corral_plugins.workers.node.identity import Folder
    from corral_plugins.workers.node.node import Options

    name = name or socket.gethostname()
    if any("\ud800" <= character <= "\udfff" for character in "".join((name, *labels))):
        raise click.UsageError("--name and --label take UTF-8 text")
    options = Options(
        url=_url(url),
        name=name,
        labels=_labels(labels),
        max_agents=max_agents,
        drain_seconds=drain_seconds,
        key=_key(token_file),
        allow=allow,
    )
    _run(options, Folder(folder or _folder(name)), until_stdin_closes=until_stdin_closes)


def _url(text: str) -> str:
    import httpx2

    if not text.startswith(("http://", "https://")):
        raise click.BadParameter("begins with http:// or https://", param_hint="--url")
    with contextlib.suppress(httpx2.InvalidURL):
        if httpx2.URL(text).host:
            return text.rstrip("/")
    raise click.BadParameter(f"{text} is no address", param_hint="--url")


def _allowed(given: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if name not in TOOL_NAMES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(TOOL_NAMES)}")
    return tuple(sorted(set(given)))


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for item in given:
        key, mark, value = item.partition("=")
        if not mark or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def _key(token_file: Path | None) -> str | None:
    if token_file is None:
        text, where = os.environ.get("CORRAL_WORKER_TOKEN", ""), "CORRAL_WORKER_TOKEN"
    else:
        text, where = token_file.read_text(encoding="utf-8", errors="replace"), f"--token-file {token_file}"
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise click.UsageError(f"{where}: this is no registration key, which is ASCII text")
    return text or None


def _folder(name: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    state = Path(base) if base else Path.home() / ".local" / "state"
    return state / "corral" / "workers" / name.replace("/", "_")


def _run(options: object, folder: object, *, until_stdin_closes: bool) -> None:
    """Until it is drained. Exit status 1: the server does not take it or nothing runs here; 3: the folder is in use."""
    import asyncio
    import logging

    from corral_plugins.workers.node.embedded import LINE
    from corral_plugins.workers.node.identity import Folder, InUse, Unusable
    from corral_plugins.workers.node.node import Node, Options, Refused
    from corral_plugins.workers.node.runner import NoProcess

    assert isinstance(options, Options)
    assert isinstance(folder, Folder)
    form = LINE if until_stdin_closes else f"%(asctime)s {LINE}"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        with folder.locked():
            asyncio.run(_serve(Node(options, folder), until_stdin_closes=until_stdin_closes))
    except InUse as error:
        click.echo(f"corral: {error}", err=True)
        sys.exit(3)
    except (Refused, Unusable, NoProcess) as error:
        click.echo(f"corral: {error}", err=True)
        sys.exit(1)


async def _serve(node: Node, *, until_stdin_closes: bool) -> None:
    import asyncio
    import signal

    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping:
            end()
        stopping = True
        node.drain()

    def end() -> None:
        node.kill()
        os._exit(130)

    def watch_parent() -> None:
        if not os.read(0, 4096):
            end()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, stop)
    if until_stdin_closes:
        loop.add_reader(0, watch_parent)
    await node.run()
