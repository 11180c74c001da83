"""The commands `corral login`, `corral logout` and `corral whoami`, which manage the user's session on a server."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import json_option, print_fields, print_value
from corral.cli.saved_sessions import SavedSession, server_name, user_sessions
from corral.cli.server_connection import (
    add_local_server_hint,
    client_command,
    default_url,
    open_client,
    running_url,
    selected_session,
    server_option,
    session_at,
    session_from_sign_in,
    valid_token,
    valid_url,
)

CODE = re.compile(r"[0-9]{6}")
LOOPBACK = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?(/|$)")


@click.command("login")
@click.argument("url", required=False)
@click.option("--email", help="email address of the account (default: prompt for the address)")
@click.option(
    "--password-file",
    type=click.Path(exists=True, allow_dash=True, dir_okay=False, path_type=Path),
    help="file that contains the password, or - for standard input (default: prompt for the password on a terminal, "
    "or else read standard input)",
)
@click.option("--with-token", is_flag=True, help="sign in with an API key, which is read from standard input")
@click.option(
    "--server", metavar="NAME", help="name under which to save the server (default: the server's host and port)"
)
@json_option
def login_command(
    url: str | None, email: str | None, password_file: Path | None, with_token: bool, server: str | None, as_json: bool
) -> None:
    """Sign in to a server, and store the session for later commands.

    The session is renewed automatically. It is stored in the user's configuration folder, and only this user can read
    it.
    """
    if with_token and (email or password_file):
        raise click.UsageError("--with-token cannot be used with --email or --password-file")
    name, url = _server(url, server)
    with ApiClient(url) as client:
        if with_token:
            session = _session_from_sign_in_token(client, valid_token(sys.stdin.read(), "--with-token"))
        else:
            session = _sign_in(client, email, password_file)
        client.set_token(session.token)
        first = _required_action_text(client.get("/auth/me")["limited"])
    sessions = user_sessions()
    with sessions.locked():
        known = sessions.find(name)
        if server is None and known is not None and known[1].email != session.email:
            name = server_name(url)  # the other name stays with the account for which it was chosen
        sessions.store(name, session, make_current=True)
    text = f"Signed in to {url} as {session.email or 'the owner of the API key'}."
    if session.expires_at is not None and session.refresh_token is None:
        minutes = round((session.expires_at - time.time()) / 60)
        text += f"\nThe server is sealed, so the session cannot renew itself: it ends in {minutes} minutes."
    if first is not None:
        text += f"\nBefore you can do anything else: {first}"
    print_value({"server": name, "url": url, "email": session.email}, as_json=as_json, text=text)


@click.command("logout")
@server_option
@json_option
def logout_command(server: str | None, as_json: bool) -> None:
    """Sign out of a server: end the session and forget it locally. An API key is also forgotten, but stays valid."""
    sessions = user_sessions()
    found = selected_session(sessions, server or os.environ.get("CORRAL_URL") or None)
    if found is None:
        print_value({"signed_out_of": None}, as_json=as_json, text="You are not signed in.")
        return
    name, session = found
    try:
        if session.expires_at is not None:
            _end_session(name)
    finally:
        with sessions.locked():
            sessions.remove(name)
    current, text = sessions.find(), f"Signed out of {session.url}."
    if current is not None:
        text += f"\nThe current server is {current[0]} ({current[1].url})."
    print_value({"signed_out_of": session.url}, as_json=as_json, text=text)


@click.command("whoami")
@client_command
def whoami_command(client: ApiClient, *, as_json: bool) -> None:
    """Show the signed-in user and the server."""
    me = client.get("/auth/me")
    shown = {
        "server": client.url,
        "email": me["email"],
        "name": me["full_name"],
        "role": me["role"],
        "second factor": "on" if me["mfa_enabled"] else "off",
        "must do first": _required_action_text(me["limited"]),
    }
    print_fields({"server": client.url, **me}, shown, as_json=as_json)


def _required_action_text(limited: str | None) -> str | None:
    """Return what the user must do before anything else, or None if `limited` is None.

    `limited` is the account's field `limited`, which contains a problem code. An unknown code is returned unchanged.
    """
    import corral_core.accounts.api  # noqa: F401  # declares the codes
    from corral.errors import CODES

    return CODES[limited].remedy if limited in CODES else limited


def _server(url: str | None, server: str | None) -> tuple[str, str]:
    """Return the name and the URL of the server to sign in to."""
    if url is None:
        sessions, here = user_sessions(), None if server else running_url()
        found = sessions.find(server) if here is None else session_at(sessions, here)
        url = os.environ.get("CORRAL_URL") or (found[1].url if found else default_url())
        if found is not None and found[1].url == url.rstrip("/"):
            return found[0], found[1].url
    if "://" not in url:
        url = f"{'http' if LOOPBACK.match(url) else 'https'}://{url}"
    url = valid_url(url, "URL")
    known = user_sessions().find(url)
    return server or (known[0] if known else server_name(url)), url


def _session_from_sign_in_token(client: ApiClient, token: str) -> SavedSession:
    client.set_token(token)
    me = client.get("/auth/me")
    return SavedSession(url=client.url, token=token, email=me["email"])


def _sign_in(client: ApiClient, email: str | None, password_file: Path | None) -> SavedSession:
    try:
        client.get("/auth/config")  # nobody types a password for a server that is not there
    except ApiClientError as error:
        raise add_local_server_hint(client.url, error) from None
    if not email or password_file is None:
        click.echo(f"Signing in to {client.url}.", err=True)
    email = email or click.prompt("Email", err=True)
    if password_file is None and sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, err=True)
    elif password_file is None:  # nothing is hidden without a terminal, of which click would warn
        click.echo("Reading the password from standard input.", err=True)
        password = sys.stdin.readline().rstrip("\r\n")
        if not password:
            raise click.UsageError(
                "standard input contains no password; give --password-file, or sign in from a terminal"
            )
    else:
        text = sys.stdin.readline() if str(password_file) == "-" else password_file.read_text("utf-8", "replace")
        password = text.rstrip("\r\n")
    try:
        answer = client.post("/auth/login", {"email": email, "password": password})
    except ApiClientError as error:
        raise ApiClientError(f"cannot sign in to {client.url}: {error}", error.status, error.problem) from None
    if answer.get("mfa_required"):
        proof = _ask_for_code()
        kind = "code" if CODE.fullmatch(proof) else "recovery_code"
        answer = client.post("/auth/mfa/challenge", {"mfa_token": answer["mfa_token"], kind: proof})
    if answer["user"]["must_change_password"]:
        answer = _change_password(client, answer, password)
    return session_from_sign_in(client.url, answer)


def _ask_for_code() -> str:
    try:
        return str(click.prompt("One-time code or recovery code", err=True)).strip()
    except click.Abort:
        if sys.stdin.isatty():
            raise
        told = "the account has a second factor; pass a one-time code or a recovery code on standard input"
        raise ApiClientError(told) from None


def _change_password(client: ApiClient, answer: Any, password: str) -> Any:
    """Ask for a new password and set it. Before this, the account cannot be used for anything else."""
    client.set_token(answer["access_token"])
    try:
        new = click.prompt(
            "The password must be changed. New password", hide_input=True, confirmation_prompt=True, err=True
        )
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise ApiClientError("the password must be changed first; sign in from a terminal") from None
    return client.post("/auth/change-password", {"current_password": password, "new_password": new})


def _end_session(name: str) -> None:
    """End the session on the server. Do nothing if the session has already ended."""
    try:
        with open_client(name) as client:
            client.send("POST", "/auth/logout")
    except ApiClientError as error:
        if error.status != 401:
            told = f"{error}; the session was removed on this machine, but stays valid on the server until it expires"
            raise ApiClientError(told, error.status, error.problem) from None
