"""Connects a command to the server that the user has signed in to.

Implements the `--server` option, and the use and renewal of tokens.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.output import json_option
from corral.cli.saved_sessions import SavedSession, SavedSessions, user_sessions

DEFAULT_URL = "http://127.0.0.1:8000"
NO_OPERATION = "There is no operation at this path"
PLUGIN_NOT_ACTIVE = (
    "the server does not run this command's plugin. If the plugin is enabled, the plugin or the last reload failed; "
    "`corral status` says why"
)
EARLY_SECONDS = 10.0  # a token that expires that soon is renewed before it is sent
TOLD = "corral.told_server"  # in the `meta` of a command that has named the server of the folder
server_option = click.option(
    "--server",
    metavar="NAME",
    help="name or URL of the server (default: CORRAL_URL; otherwise the server that runs in this folder, if you have "
    "signed in to it with `corral login`; otherwise the server of the last `corral login`)",
    shell_complete=lambda context, parameter, start: [
        CompletionItem(name) for name in user_sessions().names() if name.startswith(start)
    ],
)


def client_command(function: Callable[..., None]) -> Callable[..., None]:
    """Add `--server` and `--json` (`as_json`) to a command, and call it with a client for the selected server."""

    @server_option
    @json_option
    @functools.wraps(function)
    def call(*, server: str | None, **options: Any) -> None:
        with open_client(server) as client:
            try:
                function(client, **options)
            except ApiClientError as error:
                raise add_local_server_hint(client.url, _add_not_found_hint(error)) from None

    return call


def _add_not_found_hint(error: ApiClientError) -> ApiClientError:
    """Add a hint to the message of a "not found" error.

    If an object was not found, and the message names no command, the hint names the command that lists such objects. If
    the server lacks the operation itself, the hint says that the server does not run the command's plugin.
    """
    group = click.get_current_context().parent
    if error.status != 404 or group is None or group.parent is None or not isinstance(group.command, click.Group):
        return error
    if NO_OPERATION in str(error):
        return ApiClientError(f"{error}; {PLUGIN_NOT_ACTIVE}", error.status, error.problem)
    if error.code != "not_found" or "corral " in str(error) or "list" not in group.command.commands:
        return error
    return ApiClientError(f"{error}; run `{group.command_path} list` to find the right id", error.status, error.problem)


def add_local_server_hint(url: str, error: ApiClientError) -> ApiClientError:
    """If the server at `url` does not answer, add the address of the current folder's server to the error message.

    In all other cases, and if the command has already printed this address, the error is returned unchanged.
    """
    here = running_url() if error.status is None and "does not answer" in str(error) else None
    if here is None or here == url or click.get_current_context().meta.get(TOLD):
        return error
    return ApiClientError(f"{error}. The server for this folder is at {here}; sign in with `corral login {here}`")


def open_client(server: str | None = None) -> ApiClient:
    """Return a client for the selected server.

    `server` is the name or the URL of a server. If it is None, `CORRAL_URL` selects the server, and `CORRAL_TOKEN`
    replaces the token of a saved session. If `CORRAL_URL` is not set, the server that runs in the current folder is
    used or, if there is none, the server of the last sign-in.
    """
    sessions = user_sessions()
    url, token = os.environ.get("CORRAL_URL") or None, _token_of_environment()
    found = selected_session(sessions, server or url)
    if server is not None and found is None:
        if "://" not in server:
            known = ", ".join(sessions.names()) or "none"
            raise click.UsageError(
                f"there is no server named {server} (known servers: {known}); sign in with `corral login URL`"
            )
        url = server
    if token is not None and (server is None or found is None):
        return _client_with_token(url or (found[1].url if found else default_url()), token)
    if found is None:
        return _client_without_token(url or default_url())
    return _client_of_session(sessions, *found)


def selected_session(sessions: SavedSessions, server: str | None = None) -> tuple[str, SavedSession] | None:
    """Return the name and the session of a server, given its name or URL.

    The default is the server that runs in the current folder. If there is no session for this server, the default is
    the server of the last sign-in, and a line on standard error says so, once for each command.
    """
    here = None if server else running_url()
    if here is None:
        return sessions.find(server)
    if found := session_at(sessions, here):
        return found
    last, context = sessions.find(), click.get_current_context(silent=True)  # there is none during a tab completion
    if last is not None and context is not None and not context.meta.get(TOLD):
        context.meta[TOLD] = True
        told = f"Using {last[1].url}, the server of the last sign-in. The server for this folder is at {here}"
        click.echo(f"{told}; sign in with `corral login {here}`.", err=True)
    return last


def session_at(sessions: SavedSessions, here: str) -> tuple[str, SavedSession] | None:
    """Return the name and the session of the server at the URL `here`.

    If there is no session for a URL with the host `127.0.0.1`, look for the same URL with the host `localhost`.
    """
    return sessions.find(here) or sessions.find(here.replace("//127.0.0.1:", "//localhost:"))


def default_url() -> str:
    """Return the URL of the server that runs in the current folder, or `DEFAULT_URL` if no such server is known."""
    return running_url() or DEFAULT_URL


def running_url() -> str | None:
    """Return the URL of the server that runs in the current folder, or None.

    For a server that uses TLS, return its public URL if it has one, because certificates are seldom valid for an
    address of this machine. Otherwise, return a URL with the address on which the server listens.
    """
    from corral.cli.listener import loopback_url
    from corral.cli.registered_processes import running_server_url
    from corral.config.reader import load
    from corral.errors import StartupError

    try:
        config = load()
        running = running_server_url(config.data_dir)
    except (StartupError, OSError):  # the configuration or the data folder is not for this user
        return None
    if running is None:
        return None
    public = config.server.public_url if running.startswith("https:") else None
    return public or loopback_url(running)


def failed_reloads_of(url: str) -> dict[int, str]:
    """Return the errors of the server's processes whose last reload failed, keyed by pid.

    The result is empty if the server at `url` does not run in the current folder.
    """
    from corral.cli.registered_processes import failed_reloads
    from corral.config.reader import load

    return failed_reloads(load().data_dir) if running_url() == url else {}


def valid_url(text: str, option: str) -> str:
    """Return the URL without a trailing slash. Raise `BadParameter` if the text is not the URL of a server."""
    import httpx2

    if not text.startswith(("http://", "https://")):
        raise click.BadParameter(f"{text} must begin with http:// or https://", param_hint=option)
    try:
        if httpx2.URL(text).host:
            return text.rstrip("/")
    except httpx2.InvalidURL:
        pass
    raise click.BadParameter(f"{text} is not a valid URL", param_hint=option)


def valid_token(text: str, where: str) -> str:
    """Return the token without surrounding whitespace. Raise `UsageError` if it is empty or not printable ASCII."""
    token = text.strip()
    if not token or not (token.isascii() and token.isprintable()):
        raise click.UsageError(f"{where}: a token must consist of printable ASCII characters")
    return token


def complete_names(
    path: str, field: str = "name"
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a tab-completion function for the names of the objects at `path`, such as `/agents`.

    If the server does not answer, the function returns no names.
    """

    def complete(context: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
        try:
            with open_client(context.params.get("server")) as client:
                items = client.get(path, limit=200, **({"search": start} if start else {}))["items"]
        except (ApiClientError, click.ClickException):
            return []
        return [CompletionItem(item[field]) for item in items if item[field].casefold().startswith(start.casefold())]

    return complete


def _token_of_environment() -> str | None:
    text = os.environ.get("CORRAL_TOKEN")
    return valid_token(text, "CORRAL_TOKEN") if text else None


def _client_with_token(url: str, token: str) -> ApiClient:
    client = ApiClient(valid_url(url, "CORRAL_URL"), token)

    def refused(error: ApiClientError) -> bool:
        if error.status == 401:
            raise ApiClientError(f"{error}; set CORRAL_TOKEN to a valid API key or access token", 401, error.problem)
        return False

    client.on_refusal = refused
    return client


def _client_without_token(url: str) -> ApiClient:
    client = ApiClient(valid_url(url, "--server"))

    def refused(error: ApiClientError) -> bool:
        if error.status == 401:
            raise ApiClientError(f"you are not signed in to {client.url}; run `corral login {client.url}`", 401)
        return False

    client.on_refusal = refused
    return client


def _client_of_session(sessions: SavedSessions, name: str, session: SavedSession) -> ApiClient:
    client = ApiClient(session.url, session.token)

    def refused(error: ApiClientError) -> bool:
        if error.status == 401:
            return renew_session(sessions, name, client)
        if error.code == "reauth_required":
            return _confirm_identity(client, session)
        return False

    client.on_refusal = refused
    if session.expires_at is not None and session.expires_at < time.time() + EARLY_SECONDS:
        renew_session(sessions, name, client)
    return client


def renew_session(sessions: SavedSessions, name: str, client: ApiClient) -> bool:
    """Give the client a new token for its session, and store the token.

    Always return True, so that the refused request is sent again.

    A refresh token can be used only once. If several commands need a new token at the same time, the first one renews
    the session, and the others read the new token from the file. Raise `ApiClientError` if the session has ended.
    """
    with sessions.locked():
        found = sessions.find(name)
        if found is not None and found[1].token != client.token:
            client.set_token(found[1].token)
            return True
        if found is None or found[1].refresh_token is None:
            raise _session_ended_error(client)
        with ApiClient(client.url) as plain:
            try:
                answer = plain.post("/auth/refresh", {"refresh_token": found[1].refresh_token})
            except ApiClientError as error:
                raise (_session_ended_error(client) if error.status == 401 else error) from None
        sessions.store(name, session_from_sign_in(client.url, answer))
    client.set_token(answer["access_token"])
    return True


def session_from_sign_in(url: str, answer: Mapping[str, Any]) -> SavedSession:
    """Build the session to save from the response to a sign-in. A sealed server issues no refresh token."""
    return SavedSession(
        url=url,
        token=answer["access_token"],
        email=answer["user"]["email"],
        refresh_token=answer.get("refresh_token"),
        expires_at=time.time() + answer["expires_in"],
    )


def _session_ended_error(client: ApiClient) -> ApiClientError:
    return ApiClientError(f"your session at {client.url} has ended; sign in again: corral login {client.url}", 401)


def _confirm_identity(client: ApiClient, session: SavedSession) -> bool:
    """Ask for the password or a one-time code, because the server requires re-authentication for this action.

    Return False if the command cannot prompt the user.
    """
    if session.email is None or not sys.stdin.isatty():
        return False
    proof = click.prompt(f"Password or one-time code of {session.email}", hide_input=True, err=True)
    kind = "code" if len(proof) == 6 and proof.isascii() and proof.isdigit() else "password"
    client.post("/auth/reauth", {kind: proof})
    return True
