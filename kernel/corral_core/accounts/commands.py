"""The commands `corral user` and `corral keys`, which manage accounts and keys on the server's machine.

The commands call the same services as the API.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import click
import msgspec

from corral.auth.principal import ROLES
from corral.cli import output
from corral.cli.command_kernels import Session, has_installation, open_session
from corral.cli.output import config_option, json_option
from corral.cli.server_connection import open_client, server_option
from corral.config.reader import load as load_config

if TYPE_CHECKING:
    from corral_core.accounts.api import Role

COLUMNS = ("email", "full_name", "role", "is_active", "last_login_at")
password_option = click.option(
    "--password-file",
    type=click.Path(allow_dash=True, dir_okay=False, path_type=Path),
    help="file that contains the password, or - for standard input (default: prompt for the password on a terminal, "
    "or else read standard input)",
)


@click.group("user")
def user_command_group() -> None:
    """Manage accounts. The commands need no token: access to the data folder is sufficient."""


@user_command_group.command("create")
@click.argument("email")
@click.option("--admin", is_flag=True, help="create an admin account; the same as --role admin")
@click.option("--role", type=click.Choice(ROLES), help="role of the account (default: member)")
@click.option("--full-name", help="name of the user (default: the part of the email address before the @)")
@click.option("--must-change", is_flag=True, help="require the user to choose a new password at the first sign-in")
@password_option
@config_option
@json_option
def create_user(
    email: str,
    admin: bool,
    role: str | None,
    full_name: str | None,
    must_change: bool,
    password_file: Path | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Create an account."""
    from corral_core.accounts.api import Accounts, NewUser

    if admin and role not in (None, "admin"):
        raise click.UsageError("--admin and --role cannot be used together")
    facts = {
        "email": email,
        "full_name": full_name or email.partition("@")[0] or email,
        "role": "admin" if admin else role or "member",
        "must_change_password": must_change,
    }
    new = _convert_options(facts, NewUser)
    password = _read_password(password_file)
    with open_session(config_path, "user create", create=True) as found:
        accounts = found.service(Accounts)
        hashed = asyncio.run(accounts.hash_password(password, email=email, full_name=new.full_name))
        made = found.run(lambda: accounts.create(new, password_hash=hashed, by=found.caller))
    _print_user(made, f"Created {made.email} ({made.role}).", as_json)


@user_command_group.command("invite")
@click.argument("email")
@click.option("--role", type=click.Choice(ROLES), default="member", show_default=True, help="role of the account")
@server_option
@config_option
@json_option
def invite_user(email: str, role: Role, server: str | None, config_path: Path | None, as_json: bool) -> None:
    """Invite a person to create an account, and print the link to send to them.

    If a mail server is configured, the server also emails a link. The command creates the invitation in the local
    installation. If there is no local installation, or if --server is given, the command sends the request to the
    server as the signed-in user.
    """
    from corral_core.accounts.api import Invitations, Mail

    if server is not None or not (config_path or has_installation(load_config())):
        with open_client(server) as client:
            answer = client.post("/admin/invitations", {"email": email, "role": role})
        answer["url"] = urljoin(f"{client.url}/", answer["url"])
        text = f"Invited {answer['email']} ({answer['role']}). The link works once, until {answer['expires_at']}:"
        output.print_value(answer, as_json=as_json, text=f"{text}\n{answer['url']}")
        return
    with open_session(config_path, "user invite") as found:
        invitations, note = found.service(Invitations), _prepare_links(found)
        made, url = found.run(lambda: invitations.create(email, role, by=found.caller))
        is_mailed = found.service(Mail).is_configured
    mailed = f"\nA link is also mailed to {made.email}." if is_mailed else ""
    text = f"Invited {made.email} ({made.role}). The link works once, until {made.expires_at}:\n{url}{mailed}{note}"
    output.print_value({**msgspec.to_builtins(made), "url": url}, as_json=as_json, text=text)


def _prepare_links(found: Session) -> str:
    """Make new links use the address of the running server.

    Return a note for the user if no running server is found.
    """
    from corral.cli.registered_processes import running_server_url
    from corral_core.accounts.service.links import SingleUseLinks

    config = found.kernel.config
    if config.server.public_url:
        return ""
    if running := running_server_url(config.data_dir):
        found.service(SingleUseLinks).set_bind_address(urlsplit(running).netloc)
        return ""
    return "\nNo server runs here. If yours will have another address than the link, set CORRAL_PUBLIC_URL first."


@user_command_group.command("list")
@click.option("--role", type=click.Choice(ROLES), multiple=True, help="list only accounts with this role; repeatable")
@click.option("--active/--inactive", "active", default=None, help="list only accounts in this state (default: all)")
@config_option
@json_option
def list_users(role: tuple[str, ...], active: bool | None, config_path: Path | None, as_json: bool) -> None:
    """List all accounts, newest first."""
    from corral_core.accounts.api import UserQuery

    facts: dict[str, Any] = {"role": list(role), "limit": 200, **({} if active is None else {"is_active": active})}
    with open_session(config_path, "user list") as found:
        rows = [msgspec.to_builtins(user) for user in _all_users(found, _convert_options(facts, UserQuery))]
    output.print_table(
        rows,
        COLUMNS,
        as_json=as_json,
        empty="There are no accounts yet. Create one with: corral user create --admin EMAIL",
    )


@user_command_group.command("deactivate")
@click.argument("email")
@config_option
@json_option
def deactivate_user(email: str, config_path: Path | None, as_json: bool) -> None:
    """Deactivate an account and end its sessions. The last active admin cannot be deactivated."""
    _patch_user(config_path, "user deactivate", email, {"is_active": False}, "Deactivated {}.", as_json)


@user_command_group.command("activate")
@click.argument("email")
@config_option
@json_option
def activate_user(email: str, config_path: Path | None, as_json: bool) -> None:
    """Reactivate an account."""
    _patch_user(config_path, "user activate", email, {"is_active": True}, "Activated {}.", as_json)


@user_command_group.command("role")
@click.argument("email")
@click.argument("role", type=click.Choice(ROLES))
@config_option
@json_option
def set_user_role(email: str, role: str, config_path: Path | None, as_json: bool) -> None:
    """Change the role of an account. The last active admin must remain an admin."""
    _patch_user(config_path, "user role", email, {"role": role}, f"{{}} is now {role}.", as_json)


@user_command_group.command("reset-password")
@click.argument("email")
@click.option("--must-change", is_flag=True, help="require the user to choose a new password at the next sign-in")
@password_option
@config_option
@json_option
def reset_password(
    email: str, must_change: bool, password_file: Path | None, config_path: Path | None, as_json: bool
) -> None:
    """Replace the password of an account and end all its sessions."""
    from corral_core.accounts.api import Accounts

    with open_session(config_path, "user reset-password") as found:
        accounts, user = found.service(Accounts), _find_user(found, email)
        password = _read_password(password_file)
        hashed = asyncio.run(accounts.hash_password(password, email=user.email, full_name=user.full_name))
        user = found.run(lambda: accounts.set_password(user.id, hashed, must_change=must_change))
    _print_user(user, f"The password of {user.email} was changed, and all sessions of the account have ended.", as_json)


@user_command_group.command("show")
@click.argument("email")
@config_option
@json_option
def show_user(email: str, config_path: Path | None, as_json: bool) -> None:
    """Show the details of an account."""
    with open_session(config_path, "user show") as found:
        user = _find_user(found, email)
    facts = msgspec.to_builtins(user)
    output.print_fields(facts, {name.replace("_", " "): value for name, value in facts.items()}, as_json=as_json)


@user_command_group.command("unlock")
@click.argument("email")
@config_option
@json_option
def unlock_user(email: str, config_path: Path | None, as_json: bool) -> None:
    """Unlock an account that is locked after too many failed sign-ins."""
    from corral_core.accounts.api import AccountRecovery

    _change_user(
        config_path,
        "user unlock",
        email,
        lambda found, user: found.service(AccountRecovery).unlock(user.id),
        "Unlocked {}.",
        as_json,
    )


@user_command_group.command("reset-mfa")
@click.argument("email")
@config_option
@json_option
def reset_mfa(email: str, config_path: Path | None, as_json: bool) -> None:
    """Remove the second factor of a user who has lost it, and end all sessions of the account."""
    from corral_core.accounts.api import AccountRecovery

    told = "The second factor of {} was removed, and all sessions of the account have ended."
    _change_user(
        config_path,
        "user reset-mfa",
        email,
        lambda found, user: found.service(AccountRecovery).reset_mfa(user.id),
        told,
        as_json,
    )


@user_command_group.command("purge")
@click.argument("email")
@click.option("--yes", is_flag=True, help="do not ask for the email address as confirmation")
@config_option
@json_option
def purge_user(email: str, yes: bool, config_path: Path | None, as_json: bool) -> None:
    """Permanently erase the personal data of a deactivated account, and free its address.

    Shared objects remain and belong to "deleted user". A running server deletes private objects within a minute.
    """
    from corral_core.accounts.api import Accounts

    with open_session(config_path, "user purge") as found:
        user = _find_user(found, email)
        if user.is_active:
            raise click.ClickException(
                f"{user.email} is active; deactivate the account first: corral user deactivate {user.email}"
            )
        if not yes:
            typed = click.prompt(f"This cannot be undone. Type {user.email} to purge the account", err=True)
            if str(typed).strip().casefold() != user.email.casefold():
                raise click.ClickException(f"the address that you typed is not {user.email}; nothing was changed")
        accounts = found.service(Accounts)
        found.run(lambda: accounts.purge(user.id))
        gone = found.run(lambda: accounts.get(user.id), read=True)
    _print_user(gone, f"Purged. The account {gone.id} now appears as a deleted user.", as_json)


def _patch_user(
    config_path: Path | None, label: str, email: str, facts: dict[str, Any], text: str, as_json: bool
) -> None:
    from corral_core.accounts.api import Accounts, UserPatch

    patch = UserPatch(**facts)
    _change_user(
        config_path, label, email, lambda found, user: found.service(Accounts).update(user.id, patch), text, as_json
    )


def _change_user(
    config_path: Path | None, label: str, email: str, change: Callable[[Session, Any], Any], text: str, as_json: bool
) -> None:
    """Run `change` on the account with this address in one unit of work, and print the result.

    `text` is the message to print, in which `{}` is replaced by the address.
    """
    with open_session(config_path, label) as found:
        user = _find_user(found, email)
        user = found.run(lambda: change(found, user))
    _print_user(user, text.format(user.email), as_json)


def _find_user(found: Session, email: str) -> Any:
    from corral_core.accounts.api import Accounts

    user = found.run(lambda: found.service(Accounts).find(email), read=True)
    if user is None:
        raise click.ClickException(f"no account has the address {email}; list the accounts with: corral user list")
    return user


def _all_users(found: Session, query: Any) -> Iterator[Any]:
    from corral_core.accounts.api import Accounts

    accounts = found.service(Accounts)
    while True:
        page = found.run(lambda query=query: accounts.list(query, found.caller), read=True)  # type: ignore[misc]  # bound
        yield from page.items
        if page.next is None:
            return
        query = msgspec.structs.replace(query, cursor=page.next)


def _read_password(path: Path | None) -> str:
    """Read a password from a file, or from standard input if `path` is `-`. A trailing newline is not part of it.

    If `path` is None, prompt for the password on a terminal, or else read standard input.
    """
    if path is None and sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    if path is None:
        click.echo("Reading the password from standard input.", err=True)
    file = None if path is None or str(path) == "-" else path
    source = f"--password-file {file}" if file else "standard input"
    try:
        text = file.read_text("utf-8") if file else sys.stdin.read()
    except OSError as error:
        raise click.UsageError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from None
    password = text.removesuffix("\n").removesuffix("\r")
    if not password:
        raise click.UsageError(
            f"{source} contains no password; pipe one to the command, or give a file with --password-file"
        )
    return password


def _convert_options(facts: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(facts, kind)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from None


def _print_user(user: Any, text: str, as_json: bool) -> None:
    output.print_value(msgspec.to_builtins(user), as_json=as_json, text=text)


@click.group("keys")
def crypto_key_command_group() -> None:
    """Manage the cryptographic keys of this installation."""


@crypto_key_command_group.command("generate")
@click.option(
    "--label",
    default="v1",
    show_default=True,
    help="label of the key (only letters and digits; must differ from the labels of all other keys)",
)
@json_option
def generate_master_key(label: str, as_json: bool) -> None:
    """Generate a new master key and print it. This command does not change the installation.

    To use the new key, add it to CORRAL_MASTER_KEY before the existing keys.
    """
    if not (label.isascii() and label.isalnum()):
        raise click.UsageError("--label may contain only letters and digits")
    text = f"{label}:{base64.b64encode(secrets.token_bytes(32)).decode()}"
    output.print_value({"master_key": text}, as_json=as_json, text=text)


@crypto_key_command_group.command("rotate-jwt")
@config_option
@json_option
def rotate_jwt(config_path: Path | None, as_json: bool) -> None:
    """Create a new key for signing access tokens.

    The old key can still verify tokens until the last token signed with it expires, so no user is signed out.
    """
    from corral_core.accounts.service.authentication import SigningKeys

    with open_session(config_path, "keys rotate-jwt") as found:
        kid = found.run(found.service(SigningKeys).rotate_key)
    output.print_value(
        {"key": kid}, as_json=as_json, text=f"Within a minute, access tokens are signed with the new key {kid}."
    )
