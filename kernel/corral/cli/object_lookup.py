"""Looks up objects on the server for commands: the names of objects with known ids, and the ids of named objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from corral.cli.api_client import ApiClient, ApiClientError
from corral.ids import parse_id

MAX_REQUESTS = 50  # for one command; the objects after that are shown by their ids


class ObjectNames:
    """Finds the names of objects. Each object is requested only once.

    If an object was deleted, or the user may not read it, its id is used instead of its name. After `MAX_REQUESTS`
    requests, ids are used for all further objects.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._found: dict[str, Any] = {}

    def name(self, path: str, identifier: str | None, field: str = "name") -> str:
        """Return the name of an object, or its id if the name cannot be read, or `-` if there is no id.

        `path` is the path of the objects in the API, such as `/agents`.
        """
        if identifier is None:
            return "-"
        found = self.read(f"{path}/{identifier}")
        return identifier if found is None else str(found[field])

    def user(self, path: str, identifier: str | None) -> str:
        """Return the email address of a user, or the user's id if the address cannot be read.

        `path` is the path of users in the API. Only admins can read the addresses of other users.
        """
        me = self._client.me()
        if me["id"] == identifier:
            return str(me["email"])
        return self.name(path, identifier, "email") if me["role"] == "admin" else identifier or "-"

    def read(self, path: str) -> Any:
        """Return the object at the path, or None if it was deleted or the user may not read it.

        Also return None if `MAX_REQUESTS` other objects have already been requested.
        """
        if path not in self._found:
            if len(self._found) >= MAX_REQUESTS:
                return None
            try:
                self._found[path] = self._client.get(path)
            except ApiClientError as error:
                if error.status not in (403, 404):
                    raise
                self._found[path] = None
        return self._found[path]


def find_user_id(client: ApiClient, path: str, user: str) -> str:
    """Return the id of the user with this id or email address. `path` is the path of users in the API.

    Only admins can find other users by their addresses.
    """
    if parse_id(user) is not None:
        return user
    me = client.me()
    if user.strip().casefold() == me["email"].casefold():
        return str(me["id"])
    if me["role"] != "admin":
        raise ApiClientError(f"only admins can look up users by email address; give the id of {user} instead")
    return str(client.find(path, user, kind="user", field="email", listing="corral user list")["id"])


def newest_id(
    client: ApiClient, path: str, wanted: str, *, kind: str, titles: Callable[[Any], Iterable[str]], listing: str
) -> str:
    """Return `wanted` if it is an id, otherwise the id of the newest object at `path` with this title, ignoring case.

    Use this function for objects without names, such as notifications. `titles` returns the titles of an object. `kind`
    is the noun for the error message, and `listing` is the command that lists the objects.
    """
    if parse_id(wanted) is not None:
        return wanted
    for item in client.get(path, limit=200)["items"]:
        if wanted.strip().casefold() in {title.casefold() for title in titles(item)}:
            return str(item["id"])
    raise ApiClientError(f"there is no {kind} {wanted} at {client.url}; `{listing}` lists every {kind}", 404)
