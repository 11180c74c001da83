"""`corral api`: calls any operation of the API with the saved session."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click

from corral.cli.request_body import body_option, field_option, parse_fields, read_body
from corral.cli.server_connection import open_client, server_option
from corral.http.routes import API_PREFIX

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
WITHOUT_BODY = ("GET", "DELETE")
DATA_LENGTH = 200  # characters


@click.command("api")
@click.argument("method", type=click.Choice(METHODS, case_sensitive=False))
@click.argument("path")
@field_option
@body_option
@click.option("-H", "--header", "headers", multiple=True, help="header to send, such as 'If-Match: \"3\"'; repeatable")
@click.option("--all", "all_pages", is_flag=True, help="print the items from all pages of a list")
@server_option
def api_command(
    method: str,
    path: str,
    fields: tuple[str, ...],
    input_path: Path | None,
    headers: tuple[str, ...],
    all_pages: bool,
    server: str | None,
) -> None:
    """Call an operation of the API, for example `corral api GET /tasks -f limit=5`, and print the response as JSON.

    Fields are sent as query parameters for GET and DELETE, and as members of the JSON body for other methods.
    """
    path, query = _split_path(path, server)
    body = None
    if method in WITHOUT_BODY:
        query.update(parse_fields(fields))
        if input_path is not None:
            raise click.UsageError(f"--input cannot be used with {method}")
    else:
        body = read_body(input_path, fields)
    if all_pages and method != "GET":
        raise click.UsageError("--all can be used only with GET")
    if all_pages and headers:
        raise click.UsageError("--all cannot be used with --header")
    sent = _parse_headers(headers)
    with open_client(server) as client:
        found: Any
        if all_pages:
            found = {"items": list(client.pages(path, **query))}
        else:
            found = client.send(method, path, body=body, query=query, headers=sent)
    if sys.stdout.isatty():
        found = shorten_data(found)
    if found is not None:
        click.echo(found if isinstance(found, str) else json.dumps(found, indent=2, ensure_ascii=False))


def shorten_data(value: Any) -> Any:
    """Return the value with long `data:` URLs shortened.

    A `data:` URL contains, for example, an image, which is unreadable as text.
    """
    if isinstance(value, dict):
        return {name: shorten_data(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shorten_data(item) for item in value]
    if isinstance(value, str) and value.startswith("data:") and len(value) > DATA_LENGTH:
        return f"{value[:40]}… ({len(value)} characters; redirect the output to a file to get all of them)"
    return value


def _parse_headers(texts: tuple[str, ...]) -> dict[str, str]:
    """Return the headers, keyed by name in lower case. Raise `UsageError` for a string that is not `Name: value`."""
    headers = {}
    for text in texts:
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not re.fullmatch(r"[\w-]+", name, re.ASCII) or not (value.isascii() and value.isprintable()):
            raise click.UsageError(f"{text!r} is not a header; write it as 'Name: value'")
        if name.lower() == "authorization":
            raise click.UsageError("--header cannot set Authorization; set CORRAL_TOKEN to the token instead")
        headers[name.lower()] = value
    return headers


def _split_path(text: str, server: str | None) -> tuple[str, dict[str, Any]]:
    """Split `text` into a path relative to the API and its query parameters.

    The text may begin with `/api/v1`, or with the URL of the server. Raise `UsageError` for any other URL.
    """
    split = urlsplit(text)
    if split.netloc:
        with open_client(server) as client:
            if not text.startswith(f"{client.url}/"):
                raise click.UsageError("give only a path, such as /auth/me; choose the server with --server")
            split = urlsplit(text.removeprefix(client.url))
    path = "/" + split.path.lstrip("/")
    if path == API_PREFIX or path.startswith(f"{API_PREFIX}/"):
        path = path.removeprefix(API_PREFIX)
    return path, parse_qs(split.query, keep_blank_values=True)
