"""Pinned secrets, which are set by environment variables named `CORRAL_SECRET_<NAME>`.

They are read-only and take precedence over stored secrets with the same name.
"""

from __future__ import annotations

import uuid

import msgspec

from corral.errors import Conflict
from corral.plugin import InstallationConfig

SPACE = uuid.UUID("5b0a3c1e-7a0e-5f5e-9d0b-0c0f3a1d2e4b")
"""The UUID namespace for the ids of pinned secrets.

Each id is derived from the name, so all processes use the same ids.
"""


class PinnedSecret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret set by an environment variable. `key` is its name in lower case."""

    id: str
    name: str
    key: str
    value: str

    def __repr__(self) -> str:  # hides the value, because a repr can end up in logs
        return f"<Pinned {self.name}>"


class PinnedSecrets:
    """The pinned secrets of this process, which are read once, when the process starts."""

    def __init__(self, installation: InstallationConfig) -> None:
        made = {
            name.lower(): PinnedSecret(
                id=str(uuid.uuid5(SPACE, name.lower())), name=name, key=name.lower(), value=value
            )
            for name, value in sorted(installation.secrets.items())
        }
        self._by_key = {key: made[key] for key in sorted(made)}
        self._by_id = {item.id: item for item in made.values()}

    def all_secrets(self) -> list[PinnedSecret]:
        """Return all pinned secrets, sorted by name."""
        return list(self._by_key.values())

    def find_by_name(self, name: str) -> PinnedSecret | None:
        """Return the pinned secret with the given name, ignoring case, or None if there is none."""
        return self._by_key.get(name.lower())

    def find_by_id(self, id: str) -> PinnedSecret | None:
        """Return the pinned secret with the given id, or None if there is none."""
        return self._by_id.get(id)

    def refuse_pinned(self, *, id: str = "", name: str = "") -> None:
        """Raise `Conflict` (`setting_locked`) if the secret with this id or name is pinned."""
        found = self.find_by_id(id) or self.find_by_name(name)
        if found is not None:
            raise Conflict(
                f"{found.name} is set by the environment variable CORRAL_SECRET_{found.name}; change it there.",
                code="setting_locked",
            )
