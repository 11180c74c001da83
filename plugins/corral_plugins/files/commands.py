"""The `corral files` commands, which store, read and share files, and copy all files to another store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import config_option, json_option, print_fields, print_table, print_value
from corral.cli.server_connection import client_command, complete_names
from corral_core.accounts.api import USERS_PATH

if TYPE_CHECKING:
    from corral.plugin import OpenSession

F = TypeVar("F", bound=Callable[..., Any])

COLUMNS = ("name", "size", "detected_type", "visibility", "task", "created_at", "id")
SOURCES = ("user", "worker", "agent", "export", "step")
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")

file_argument = click.argument("file", shell_complete=complete_names("/files"))


def _task_option(help_text: str) -> Callable[[F], F]:
    return click.option(
        "--task", metavar="TASK", help=f"{help_text}, by title or id", shell_complete=complete_names("/tasks", "title")
    )


@click.group("files")
def files_command_group() -> None:
    """Store, read and share files, which are the inputs and results of tasks. FILE is an id or a name."""


@files_command_group.command("list")
@_task_option("list only files of this task")
@click.option("--search", help="list only files whose name contains this text")
@click.option("--source", type=click.Choice(SOURCES), help="list only files from sources of this kind")
@client_command
def list_files(client: ApiClient, *, task: str | None, as_json: bool, **filters: str | None) -> None:
    """List the files that you may read, newest first."""
    query = {name: value for name, value in filters.items() if value is not None}
    if task is not None:
        query["task_id"] = _task_id(client, task)
    names = ObjectNames(client)
    print_table(
        list(client.pages("/files", **query)),
        COLUMNS,
        as_json=as_json,
        empty="There are no such files. Store one: corral files upload PATH",
        computed={
            "size": lambda file: format_bytes(file["size_bytes"]),
            "task": lambda file: names.name("/tasks", file["task_id"], "title"),
        },
    )


@files_command_group.command("upload")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--name", help="name of the file in Corral (default: the last part of PATH)")
@_task_option("task that the file belongs to")
@click.option("--share", is_flag=True, help="let everyone who may read the task read the file")
@click.option("--expires-at", metavar="TIME", help="delete the file at this time, such as 2030-01-31T12:00:00Z")
@client_command
def upload_file(
    client: ApiClient,
    *,
    path: Path,
    name: str | None,
    task: str | None,
    share: bool,
    expires_at: str | None,
    as_json: bool,
) -> None:
    """Store a file, or standard input if PATH is `-`."""
    if share and task is None:
        raise click.UsageError(
            "--share needs --task TASK, because a file is shared with everyone who may read its task"
        )
    given = {"name": name, "visibility": "task" if share else None, "expires_at": expires_at}
    fields = {key: value for key, value in given.items() if value is not None}
    query = {} if task is None else {"task_id": _task_id(client, task)}
    with sys.stdin.buffer if str(path) == "-" else path.open("rb") as content:
        shown = name or ("stdin" if str(path) == "-" else path.name)
        made = client.upload("/files/upload", content, shown, query=query, fields=fields)
    text = f"Stored {made['name']} ({format_bytes(made['size_bytes'])}) as {made['id']}."
    print_value(made, as_json=as_json, text=text)


@files_command_group.command("download")
@file_argument
@click.option(
    "--to",
    "target",
    type=click.Path(allow_dash=True, path_type=Path),
    help="file or folder to write to, or - for standard output (default: the name under which the file is stored)",
)
@click.option("--force", is_flag=True, help="replace an existing file")
@client_command
def download_file(client: ApiClient, *, file: str, target: Path | None, force: bool, as_json: bool) -> None:
    """Download a file and check its SHA-256 hash. The target file appears only when the download is complete."""
    found = _find(client, file)
    if target is not None and str(target) == "-":
        for chunk in client.download(f"/files/{found['id']}/download"):
            sys.stdout.buffer.write(chunk)
        return
    path = Path(found["name"]) if target is None else target / found["name"] if target.is_dir() else target
    if not path.parent.is_dir():
        raise click.ClickException(f"the folder {path.parent} does not exist; create it, or choose another location")
    if path.exists() and not force:
        raise click.ClickException(
            f"{path} already exists; use --force to replace it, or --to to choose another location"
        )
    _write(client, found, path)
    text = f"Wrote {format_bytes(found['size_bytes'])} to {path}."
    print_value({**found, "path": str(path)}, as_json=as_json, text=text)


@files_command_group.command("show")
@file_argument
@click.option(
    "--link", is_flag=True, help="also create a download link that works without signing in and expires after an hour"
)
@client_command
def show_file(client: ApiClient, *, file: str, link: bool, as_json: bool) -> None:
    """Show a file. With --link, also create and show a download link."""
    found = _find(client, file)
    made = client.get(f"/files/{found['id']}/url") if link else {}
    said, names = found["content_type"] if found["type_mismatch"] else None, ObjectNames(client)
    shown = {
        "name": found["name"],
        "id": found["id"],
        "size": format_bytes(found["size_bytes"]),
        "type": found["detected_type"],
        "uploaded as": said,
        "sha256": found["sha256"],
        "visibility": found["visibility"],
        "task": f"{names.name('/tasks', found['task_id'], 'title')} ({found['task_id']})" if found["task_id"] else None,
        "owner": names.user(USERS_PATH, found["owner_id"]) if found["owner_id"] else None,
        "made by": found["source"]["type"],
        "created": found["created_at"],
        "expires": found["expires_at"],
        "link": _whole_url(client, made["url"]) if made else None,
        "link expires": made.get("expires_at"),
    }
    print_fields({**found, **({"link": made} if made else {})}, shown, as_json=as_json)


@files_command_group.command("share")
@file_argument
@_task_option("task whose readers may read the file")
@click.option("--off", is_flag=True, help="make the file private again")
@client_command
def share_file(client: ApiClient, *, file: str, task: str | None, off: bool, as_json: bool) -> None:
    """Share a file with everyone who may read its task, or make it private again."""
    found = _find(client, file)
    if not off and task is None and found["task_id"] is None:
        raise click.UsageError("the file does not belong to a task; choose a task with --task TASK")
    body = {"visibility": "private" if off else "task"}
    if task is not None:
        body["task_id"] = _task_id(client, task)
    changed = client.send("PATCH", f"/files/{found['id']}", body=body)
    text = (
        f"{changed['name']} is private." if off else f"{changed['name']} is shared with everyone who may read its task."
    )
    print_value(changed, as_json=as_json, text=text)


@files_command_group.command("delete")
@file_argument
@client_command
def delete_file(client: ApiClient, *, file: str, as_json: bool) -> None:
    """Delete a file. Its links stop working."""
    found = _find(client, file)
    client.send("DELETE", f"/files/{found['id']}")
    print_value(found, as_json=as_json, text=f"Deleted {found['name']}.")


@files_command_group.command("usage")
@client_command
def show_usage(client: ApiClient, *, as_json: bool) -> None:
    """Show how much space your files occupy, and your quota."""
    found = client.get("/files/usage")
    quota = "unlimited" if found["quota_bytes"] is None else format_bytes(found["quota_bytes"])
    shown = {"files": found["files"], "size": format_bytes(found["bytes"]), "quota": quota}
    print_fields(found, shown, as_json=as_json)


@files_command_group.command("move")
@click.option(
    "--to",
    "url",
    required=True,
    metavar="URL",
    help="URL of the store to copy the files to: s3://bucket?endpoint=… or file:///…",
)
@config_option
@json_option
@click.pass_obj
def move_files(open_session: OpenSession, url: str, config_path: Path | None, as_json: bool) -> None:
    """Copy all stored files to another store, and verify the copies.

    After an interruption, run the command again to continue. The server continues to use its current store. When the
    copy is complete, set CORRAL_STORAGE_URL to the new URL, restart the server, and run this command once more with the
    old CORRAL_STORAGE_URL to copy the files that were added in the meantime.
    """
    import asyncio

    from corral.cli.file_stores import open_file_store
    from corral_plugins.files.service.store_transfer import StoreTransfer

    target = open_file_store(url, config_path)
    if target is None:
        raise click.ClickException("no active plugin supports this URL; use s3://bucket?endpoint=… or file:///…")
    with open_session(config_path, "files move") as session:
        move = StoreTransfer(session.service, session.run)
        report = asyncio.run(move.run(target))
    if report.failed:
        names = ", ".join(report.failed[:5])
        raise click.ClickException(
            f"{len(report.failed)} file{'' if len(report.failed) == 1 else 's'} could not be copied intact: {names}"
        )
    found: dict[str, Any] = {"copied": report.copied, "present": report.present, "bytes": report.bytes}
    text = (
        f"Copied {report.copied} files ({format_bytes(report.bytes)}); {report.present} were there already. "
        f"Now set CORRAL_STORAGE_URL to the new URL and restart the server."
    )
    print_value(found, as_json=as_json, text=text)


def format_bytes(size: int) -> str:
    """Format a number of bytes, for example as `12 bytes` or `3.5 MiB`."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {UNITS[unit]}"


def _task_id(client: ApiClient, task: str) -> str:
    return str(client.find("/tasks", task, kind="task", field="title")["id"])


def _find(client: ApiClient, file: str) -> Any:
    return client.find("/files", file, kind="file")


def _whole_url(client: ApiClient, url: str) -> str:
    return url if "://" in url else f"{client.url}{url}"


def _write(client: ApiClient, found: Any, path: Path) -> None:
    import hashlib

    part, digest = path.with_name(f"{path.name}.part"), hashlib.sha256()
    try:
        with part.open("wb") as file:
            for chunk in client.download(f"/files/{found['id']}/download"):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != found["sha256"]:
            raise ApiClientError("the download was interrupted; run the command again")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
