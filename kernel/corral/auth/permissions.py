"""Every declared permission, and who holds which."""

from __future__ import annotations

from collections.abc import Iterable

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN, Permission


def narrowed(permissions: Iterable[str], scopes: Iterable[str]) -> frozenset[str]:
    """The permissions that scopes leave: their own names, `<plugin>.*`, `*.<verb>` or `*`."""
    wanted = list(scopes)
    return frozenset(name for name in permissions if any(_covers(scope, name) for scope in wanted))


def _covers(scope: str, permission: str) -> bool:
    area, _, verb = scope.partition(".")
    own_area, _, own_verb = permission.partition(".")
    return scope in ("*", permission) or (verb == "*" and area == own_area) or (area == "*" and verb == own_verb)


class Permissions:
    """Filled at boot with what the active plugins declare."""

    def __init__(self) -> None:
        self._declared: dict[str, Permission] = {}
        self._held: dict[str, frozenset[str]] = {}

    def declare(self, permissions: Iterable[Permission]) -> None:
        """Add permissions."""
        self._declared.update((permission.name, permission) for permission in permissions)
        self._held.clear()

    def of(self, role_or_kind: str) -> frozenset[str]:
        """What a role (`member`), or a kind of machine (`worker`, `agent`), holds."""
        held = self._held.get(role_or_kind)
        if held is None:
            held = frozenset(name for name, item in self._declared.items() if item.held_by(role_or_kind))
            self._held[role_or_kind] = held
        return held

    def are_privileged(self, needs: Iterable[str]) -> bool:
        """Whether only admins and auditors hold these, so that a refusal is one for the audit log."""
        found = [self._declared.get(need) for need in needs]
        return all(item is not None and set(item.holders) <= {"admin", "auditor"} for item in found)

    def knows(self, need: str) -> bool:
        """Whether a route may ask for it."""
        return need in self._declared or need in (PUBLIC, SIGNED_IN, ANY_CALLER)

    def all(self) -> list[Permission]:
        """By name."""
        return [self._declared[name] for name in sorted(self._declared)]
