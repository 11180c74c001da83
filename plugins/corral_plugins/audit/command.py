"""The command group `corral audit`, which verifies and exports the audit log on the server or on another machine."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import msgspec

if TYPE_CHECKING:
    from corral.plugin import CommandSession, OpenSession
    from corral_plugins.audit.service.signing import ExternalCheckpoints
    from corral_plugins.audit.shapes import VerificationResult

HEADER_BYTES = 16

config_option = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="path to corral.toml"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
readable = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("audit")
def audit_command() -> None:
    """Verify and export the audit log, and print its checkpoints."""


@audit_command.command("verify")
@click.argument("source", required=False)
@click.option(
    "--checkpoints",
    "checkpoints_path",
    type=readable,
    help="file that contains previously saved checkpoints of the audit log",
)
@click.option(
    "--public-key",
    help="base64-encoded public key that verifies the checkpoints (default: the key in the --checkpoints file)",
)
@click.option("--filtered", is_flag=True, help="accept missing rows; use this option if SOURCE is a filtered export")
@config_option
@json_option
@click.pass_obj
def verify_log(
    open_session: OpenSession,
    source: str | None,
    checkpoints_path: Path | None,
    public_key: str | None,
    filtered: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Verify that no row was altered or removed.

    SOURCE is a copy of the database (a file, or postgresql://…) or an export (.jsonl, .csv). The default is the log of
    this installation. Removal of the newest rows is detected only with --checkpoints. The exit status is 1 if the log
    is not intact.

    The command needs no token: access to the data folder is sufficient. It ignores CORRAL_URL and CORRAL_TOKEN.
    """
    from corral_plugins.audit.service.signing import ExternalCheckpoints
    from corral_plugins.audit.service.verify import UnreadableFile, read_checkpoints

    try:
        external = ExternalCheckpoints() if checkpoints_path is None else read_checkpoints(checkpoints_path, public_key)
        if source is not None:
            verdict = _verify_source(source, external, filtered=filtered)
        else:
            with open_session(config_path, "audit verify") as session:
                verdict = _verify_installation(session, external)
    except UnreadableFile as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict)).decode())
    else:
        click.echo(_describe_verdict(verdict))
    sys.exit(0 if verdict.ok else 1)


@audit_command.command("export")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="format of the exported rows",
)
@click.option("--output", type=click.File("wb"), default="-", help="file to write (default: standard output)")
@config_option
@click.pass_obj
def export_log(open_session: OpenSession, format_: str, output: BinaryIO, config_path: Path | None) -> None:
    """Write the log to a file, oldest row first. `corral audit verify FILE` can verify the file on any machine."""
    from corral_plugins.audit.service.export import LogExport
    from corral_plugins.audit.shapes import ExportQuery

    async def write(found: LogExport) -> None:
        async for chunk in found.chunks():
            output.write(chunk)

    with open_session(config_path, "audit export") as session:
        _record_access(session, "export", format=format_)
        asyncio.run(write(LogExport(_work_function(session), ExportQuery(format=format_))))


@audit_command.command("checkpoints")
@config_option
@click.pass_obj
def print_checkpoints(open_session: OpenSession, config_path: Path | None) -> None:
    """Print all checkpoints and the public key as JSON.

    Store the output where no admin of this server can change it.
    """
    from corral_plugins.audit.service import queries

    with open_session(config_path, "audit checkpoints") as session:
        _record_access(session, "read", what="checkpoints")
        found, keys = session.run(lambda: (queries.checkpoints_between(-1, 2**62), queries.public_keys()), read=True)
    listed = {"items": [found[seq] for seq in sorted(found)], "public_key": keys[-1] if keys else None}
    click.echo(msgspec.json.format(msgspec.json.encode(listed)).decode())


def _verify_installation(session: CommandSession, external: ExternalCheckpoints) -> VerificationResult:
    from corral_plugins.audit.service.verify import Verification

    verdict = asyncio.run(session.service(Verification).verify(None, None, external, seconds=math.inf))
    _record_access(session, "verify", ok=verdict.ok, checked=verdict.checked)
    return verdict


def _verify_source(source: str, external: ExternalCheckpoints, *, filtered: bool) -> VerificationResult:
    from corral_plugins.audit.service.verify import UnreadableFile, verify_export

    if (url := _database_url(source)) is not None:
        return _verify_database(url, external)
    path = Path(source)
    if not path.is_file():
        raise UnreadableFile(f"{source}: no such file")
    return verify_export(path, external, sparse=filtered)


def _verify_database(url: str, external: ExternalCheckpoints) -> VerificationResult:
    from corral.database.connect import connect
    from corral_plugins.audit.service.verify import Verification

    database = connect(url)
    try:
        return asyncio.run(Verification(database.work).verify(None, None, external, seconds=math.inf))
    finally:
        database.close()


def _record_access(session: CommandSession, verb: str, **details: Any) -> None:
    from corral.plugin import AuditEntry
    from corral_plugins.audit.service.log import AuditLog

    log = session.service(AuditLog)
    entry = AuditEntry(action=f"audit.log.{verb}", object_type="audit_log", object_id=None, details=details)
    session.run(lambda: log.record(entry))


def _work_function(session: CommandSession) -> Any:
    from corral.database.engine import Work

    return session.service(Work)


def _describe_verdict(verdict: VerificationResult) -> str:
    checked = f"{verdict.checked} rows and {verdict.checkpoints_checked} checkpoints checked"
    if verdict.ok:
        return f"The log is intact: {checked}; the last row is {verdict.head.seq}, hash {verdict.head.hash}."
    return f"The log is NOT intact: row {verdict.first_bad_seq}: {verdict.reason}; {checked}."


def _database_url(source: str) -> str | None:
    """Return the URL of a database, given its URL or the path of its file. Return None for an export or a missing file.

    A file is a database if its header contains a NUL byte, because exports are text.
    """
    from corral.database.connect import FILE_SCHEME, SERVER_SCHEMES

    if source.startswith((FILE_SCHEME, *SERVER_SCHEMES)):
        return source
    path = Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return f"{FILE_SCHEME}{path.resolve()}" if b"\0" in file.read(HEADER_BYTES) else None
