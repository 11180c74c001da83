"""`corral audit`: prove, take away and keep the log on the machine itself, or away from it."""

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
    from corral_plugins.audit.service.signing import Kept
    from corral_plugins.audit.shapes import Verdict

config_option = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read"
)
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")
readable = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("audit")
def command() -> None:
    """The audit log: verify it, take it away, keep its checkpoints."""


@command.command("verify")
@click.argument("source", required=False)
@click.option("--checkpoints", "checkpoints_path", type=readable, help="checkpoints that were kept elsewhere")
@click.option("--public-key", help="the key that signs them, in base64 (default: the one in that file)")
@click.option("--filtered", is_flag=True, help="the export was filtered: rows between may be absent")
@config_option
@json_option
@click.pass_obj
def verify(
    open_session: OpenSession,
    source: str | None,
    checkpoints_path: Path | None,
    public_key: str | None,
    filtered: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Prove that no row was altered, dropped or cut off.

    SOURCE: a copy of the database (a file, or postgresql://…) or an export (.jsonl, .csv); without it the log of
    this installation. Cutting off the newest rows shows with --checkpoints only. Exits with 1 when it is not whole.
    """
    from corral_plugins.audit.service.offline import Unreadable, read_checkpoints
    from corral_plugins.audit.service.signing import Kept

    try:
        kept = Kept() if checkpoints_path is None else read_checkpoints(checkpoints_path, public_key)
        if source is not None:
            verdict = _elsewhere(source, kept, filtered=filtered)
        else:
            with open_session(config_path, "audit verify") as session:
                verdict = _here(session, kept)
    except Unreadable as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdict)).decode())
    else:
        click.echo(_sentence(verdict))
    sys.exit(0 if verdict.ok else 1)


@command.command("export")
@click.option("--format", "format_", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--output", type=click.File("wb"), default="-", help="file to write (default: standard output)")
@config_option
@click.pass_obj
def export(open_session: OpenSession, format_: str, output: BinaryIO, config_path: Path | None) -> None:
    """Write the log to a file, oldest row first; `corral audit verify FILE` proves it anywhere."""
    from corral_plugins.audit.service.export import Export
    from corral_plugins.audit.shapes import ExportQuery

    async def write(found: Export) -> None:
        async for chunk in found.chunks():
            output.write(chunk)

    with open_session(config_path, "audit export") as session:
        _note(session, "export", format=format_)
        asyncio.run(write(Export(_work(session), ExportQuery(format=format_))))


@command.command("checkpoints")
@config_option
@click.pass_obj
def checkpoints(open_session: OpenSession, config_path: Path | None) -> None:
    """Print all checkpoints and the key that signs them, as JSON: keep it where no admin of this machine can write."""
    from corral_plugins.audit.service import reading

    with open_session(config_path, "audit checkpoints") as session:
        _note(session, "read", what="checkpoints")
        found, keys = session.run(lambda: (reading.checkpoints(-1, 2**62), reading.public_keys()), read=True)
    listed = {"items": [found[seq] for seq in sorted(found)], "public_key": keys[-1] if keys else None}
    click.echo(msgspec.json.format(msgspec.json.encode(listed)).decode())


def _here(session: CommandSession, kept: Kept) -> Verdict:
    from corral_plugins.audit.service.verify import Verification

    verdict = asyncio.run(session.service(Verification).look(None, None, kept, seconds=math.inf))
    _note(session, "verify", ok=verdict.ok, checked=verdict.checked)
    return verdict


def _elsewhere(source: str, kept: Kept, *, filtered: bool) -> Verdict:
    from corral.database.connect import database_url
    from corral_plugins.audit.service.offline import Unreadable, verify_export

    if (url := database_url(source)) is not None:
        return _copy(url, kept)
    path = Path(source)
    if not path.is_file():
        raise Unreadable(f"{source}: there is no such file")
    return verify_export(path, kept, sparse=filtered)


def _copy(url: str, kept: Kept) -> Verdict:
    from corral.database.connect import connect
    from corral_plugins.audit.service.verify import Verification

    database = connect(url)
    try:
        return asyncio.run(Verification(database.work).look(None, None, kept, seconds=math.inf))
    finally:
        database.close()


def _note(session: CommandSession, verb: str, **details: Any) -> None:
    from corral.plugin import AuditEntry
    from corral_plugins.audit.service.log import AuditLog

    log = session.service(AuditLog)
    entry = AuditEntry(action=f"audit.log.{verb}", object_type="audit_log", object_id=None, details=details)
    session.run(lambda: log.record(entry))


def _work(session: CommandSession) -> Any:
    from corral.database.engine import Work

    return session.service(Work)


def _sentence(verdict: Verdict) -> str:
    looked = f"{verdict.checked} rows and {verdict.checkpoints_checked} checkpoints were checked"
    if verdict.ok:
        return f"The log is whole: {looked}; it ends with row {verdict.head.seq}, {verdict.head.hash}."
    return f"The log is NOT whole: row {verdict.first_bad_seq}: {verdict.reason}; {looked}."
