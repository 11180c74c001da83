"""Secrets that the operator pins by `CORRAL_SECRET_<NAME>`: read-only, and stronger than stored ones of their names."""

from __future__ import annotations

import uuid

import msgspec

from corral.errors import Conflict
from corral.plugin import Installation

SPACE = uuid.UUID("5b0a3c1e-7a0e-5f5e-9d0b-0c0f3a1d2e4b")
"""Ids of pinned secrets are made of their names, so they are the same in every process."""


class Pinned(msgspec.Struct, frozen=True, kw_only=True):
    """One of them."""

    id: str
    name: str
    key: str
    value: str

    def __repr__(self) -> str:  # it holds a secret, and a repr ends up in logs
        return f"<Pinned {self.name}>"


class Environment:
    """Those of this process; they do not change while it runs."""

    def __init__(self, installation: Installation) -> None:
        made = {
            name.lower(): Pinned(id=str(uuid.uuid5(SPACE, name.lower())), name=name, key=name.lower(), value=value)
            for name, value in sorted(installation.secrets.items())
        }
        self._by_key = {key: made[key] for key in sorted(made)}
        self._by_id = {item.id: item for item in made.values()}

    def all(self) -> list[Pinned]:
        """By name."""
        return list(self._by_key.values())

    def named(self, name: str) -> Pinned | None:
        """By name, in any case."""
        return self._by_key.get(name.lower())

    def get(self, id: str) -> Pinned | None:
        """By id."""
        return self._by_id.get(id)

    def refuse(self, *, id: str = "", name: str = "") -> None:
        """Raise `setting_locked` for one that is pinned."""
        found = self.get(id) or self.named(name)
        if found is not None:
            raise Conflict(
                f"{found.name} is set by CORRAL_SECRET_{found.name}; change it there.", code="setting_locked"
            )
