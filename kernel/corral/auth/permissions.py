"""The declared permissions, and the roles and kinds of machine (such as `worker`) that hold them."""

from __future__ import annotations

from collections.abc import Iterable

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Permission


def within_scopes(permissions: Iterable[str], scopes: Iterable[str]) -> frozenset[str]:
    """Return the permissions that the scopes allow. A scope is a permission name, `<plugin>.*`, `*.<verb>` or `*`."""
    wanted = list(scopes)
    return frozenset(name for name in permissions if any(_covers(scope, name) for scope in wanted))


def _covers(scope: str, permission: str) -> bool:
    area, _, verb = scope.partition(".")
    own_area, _, own_verb = permission.partition(".")
    return scope in ("*", permission) or (verb == "*" and area == own_area) or (area == "*" and verb == own_verb)


class Permissions:
    """The permissions declared by the active plugins. They are added at boot."""

    def __init__(self) -> None:
        self._declared: dict[str, Permission] = {}
        self._held: dict[str, frozenset[str]] = {}

    def declare(self, permissions: Iterable[Permission]) -> None:
        """Add the permissions that a plugin declares."""
        self._declared.update((permission.name, permission) for permission in permissions)
        self._held.clear()

    def held_by(self, role_or_kind: str) -> frozenset[str]:
        """Return the names of the permissions that a role (`member`, …) or a kind of machine (`worker`, …) holds."""
        if role_or_kind not in self._held:
            names = (name for name, item in self._declared.items() if item.held_by(role_or_kind))
            self._held[role_or_kind] = frozenset(names)
        return self._held[role_or_kind]

    def are_privileged(self, needs: Iterable[str]) -> bool:
        """Return whether only admins and auditors hold these permissions.

        If so, refused requests that need these permissions are audited.
        """
        found = [self._declared.get(need) for need in needs]
        return all(item is not None and set(item.holders) <= {"admin", "auditor"} for item in found)

    def is_known(self, need: str) -> bool:
        """Return whether a route may require `need`.

        A route may require a declared permission, `PUBLIC`, `SIGNED_IN` or `ANY_CALLER`.
        """
        return need in self._declared or need in (PUBLIC, SIGNED_IN, ANY_CALLER)

    def all(self) -> list[Permission]:
        """Return all permissions, sorted by name."""
        return [self._declared[name] for name in sorted(self._declared)]
