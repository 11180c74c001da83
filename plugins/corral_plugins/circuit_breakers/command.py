"""The command group `corral circuit-breakers`, which manages the circuit breakers of a server."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import print_fields, print_table, print_value
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command

BREAKERS = "/circuit-breakers"
COLUMNS = ("name", "of", "state", "failures", "slow", "rejected", "retry_at", "reason")
NAMED = {"notify": "/notifications/channels", "ssh": "/ssh-connections"}
"""The API paths of the objects whose ids are part of circuit breakers' names, keyed by the kind of circuit breaker."""
STATES = ("closed", "open", "half_open")

name_argument = click.argument("name")
reason_option = click.option("--reason", default="", help="reason for the change, to be shown with the breaker")


@click.group("circuit-breakers")
def circuit_breakers_command_group() -> None:
    """Manage circuit breakers, which stop calls to failing systems."""


@circuit_breakers_command_group.command("list")
@click.option("--state", type=click.Choice(STATES), multiple=True, help="list only breakers in this state; repeatable")
@click.option("--prefix", help="list only breakers whose names begin with this text, such as 'llm:'")
@client_command
def list_breakers(client: ApiClient, *, state: tuple[str, ...], prefix: str | None, as_json: bool) -> None:
    """List circuit breakers, sorted by name."""
    query: dict[str, Any] = {"state": list(state), **({"prefix": prefix} if prefix else {})}
    names = ObjectNames(client)
    print_table(
        list(client.pages(BREAKERS, **query)),
        COLUMNS,
        as_json=as_json,
        empty="There are no such circuit breakers.",
        computed={
            "of": lambda breaker: _named_object(names, breaker["name"]),
            "state": _state,
            "failures": lambda breaker: _share(breaker, "failures"),
            "slow": lambda breaker: _share(breaker, "slow"),
            "rejected": lambda breaker: breaker["counts"]["rejected"],
        },
    )


@circuit_breakers_command_group.command("show")
@name_argument
@client_command
def show_breaker(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Show a circuit breaker with its latest transitions."""
    with _explain_not_found(client, name):
        found = client.get(_path(name))
    error, window = found["last_error"], f"{found['window_size']} {_UNITS[found['window_type']]}"
    shown = {
        "name": found["name"],
        "description": found["description"],
        "state": _state(found),
        "reason": found["reason"],
        "open since": found["opened_at"],
        "next call": found["retry_at"],
        "enabled": found["enabled"],
        "guards calls": found["guarded"],
        "opens at": f"{found['failure_rate_threshold']} % failures or {found['slow_call_rate_threshold']} % calls over "
        f"{found['slow_call_duration_seconds']} s, of at least {found['minimum_calls']} calls",
        "window": window,
        "stays open": f"{found['wait_open_seconds']} s",
        "probes": f"{found['half_open_permits']} at a time, for at most {found['half_open_max_seconds']} s",
        "failures": _share(found, "failures"),
        "slow": _share(found, "slow"),
        "rejected": found["counts"]["rejected"],
        "last error": f"{error['type']}: {error['message']}" if error else None,
    }
    print_fields(found, shown, as_json=as_json)
    if not as_json and found["transitions"]:
        click.echo()
        names: dict[str, str] = {}
        print_table(
            found["transitions"],
            ("at", "from", "to", "reason", "by"),
            as_json=False,
            computed={"by": lambda transition: _actor_name(client, transition["by"], names)},
        )


@circuit_breakers_command_group.command("set")
@name_argument
@field_option
@body_option
@client_command
def set_breaker(
    client: ApiClient, *, name: str, fields: tuple[str, ...], input_path: Path | None, as_json: bool
) -> None:
    """Configure a circuit breaker, for example with -f wait_open_seconds:=10. Other fields keep their values.

    If there is no circuit breaker with this name, it is created.
    """
    body = read_body(input_path, fields)
    if not body and (known := _find_breaker(client, name)) is not None:
        text = f"Nothing was changed, because {name} exists already; give --field or --input to configure it."
        print_value(known, as_json=as_json, text=text)
        return
    made = client.post(BREAKERS, {**body, "name": name})
    text = f"Created {name} with the default configuration. It guards no calls yet."
    print_value(made, as_json=as_json, text=_state_text(made) if body else text)


@circuit_breakers_command_group.command("force-open")
@name_argument
@reason_option
@client_command
def force_open_breaker(client: ApiClient, *, name: str, reason: str, as_json: bool) -> None:
    """Open a circuit breaker, and keep it open until force-close or reset closes it."""
    _act(client, name, "force-open", {"reason": reason}, as_json=as_json)


@circuit_breakers_command_group.command("force-close")
@name_argument
@reason_option
@client_command
def force_close_breaker(client: ApiClient, *, name: str, reason: str, as_json: bool) -> None:
    """Close a circuit breaker. Further failures open it again."""
    _act(client, name, "force-close", {"reason": reason}, as_json=as_json)


@circuit_breakers_command_group.command("reset")
@name_argument
@client_command
def reset_breaker(client: ApiClient, *, name: str, as_json: bool) -> None:
    """Close a circuit breaker and reset its counters to zero. Its configuration is kept."""
    _act(client, name, "reset", None, as_json=as_json)


_UNITS = {"count": "calls", "time": "seconds"}


def _path(name: str) -> str:
    return f"{BREAKERS}/{quote(name, safe=':')}"


def _actor_name(client: ApiClient, actor_id: str | None, names: dict[str, str]) -> str:
    """Return the email address of the user who caused a transition, or `corral` if nobody did.

    If the user cannot be read, or an API key caused the transition, return the id.
    """
    if actor_id is None:
        return "corral"
    if actor_id not in names:
        try:
            names[actor_id] = str(client.get(f"/admin/users/{actor_id}")["email"])
        except ApiClientError as error:
            if error.status not in (403, 404):
                raise
            names[actor_id] = actor_id
    return names[actor_id]


def _explain_not_found(client: ApiClient, name: str) -> AbstractContextManager[None]:
    return client.explain_not_found("circuit breaker", name, "corral circuit-breakers list")


def _find_breaker(client: ApiClient, name: str) -> dict[str, Any] | None:
    try:
        return dict(client.get(_path(name)))
    except ApiClientError as error:
        if error.status != 404:
            raise
        return None


def _act(client: ApiClient, name: str, action: str, body: Any, *, as_json: bool) -> None:
    with _explain_not_found(client, name):
        changed = client.post(f"{_path(name)}/{action}", body)
    print_value(changed, as_json=as_json, text=_state_text(changed))


def _state_text(breaker: dict[str, Any]) -> str:
    return f"{breaker['name']} is {_state(breaker)}."


def _named_object(names: ObjectNames, breaker: str) -> str:
    """Return the name of the object whose id is in a circuit breaker's name, or an empty string if there is none."""
    kind, _, identifier = breaker.partition(":")
    return names.name(NAMED[kind], identifier) if kind in NAMED else ""


def _state(breaker: Any) -> str:
    if not breaker["enabled"]:
        return "disabled"
    return "forced open" if breaker["forced"] else str(breaker["state"]).replace("_", "-")


def _share(breaker: Any, what: str) -> str:
    return f"{breaker['counts'][what]} of {breaker['counts']['calls']}"
