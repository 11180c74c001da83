"""Events: typed payloads with a name and a visibility, emitted in a unit of work and written in its transaction."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from corral.database.model import SHARED
from corral.database.unit import Actor, current
from corral.ids import new_id

PRIVATE_AND_ADMIN = "private_and_admin"


class Event(msgspec.Struct, kw_only=True):
    """Base class of all events.

    The fields are the payload (at most 32 KiB). The first line of the docstring is the title.
    """

    event: ClassVar[str]
    """The public name, `noun.past_participle`."""
    visibility: ClassVar[str] = SHARED
    area: ClassVar[str] = ""
    """The permission area of the event: admins read its objects by `<area>.read`. Empty: the name of the plugin."""


class Emitted(msgspec.Struct, frozen=True):
    """An emitted event, which is written at the end of its unit."""

    id: str
    event: Event
    object_type: str
    object_id: str
    owner_id: str | None
    visibility: str
    actor: Actor
    cause: tuple[str, ...]


def emit(
    event: Event,
    *,
    object: tuple[str, str],
    owner: str | None = None,
    visibility: str | None = None,
    actor: Actor | None = None,
    cause: tuple[str, ...] | None = None,
) -> str:
    """Emit the event in the current unit and return its id. `object` is `(type, id)`, `owner` is a user id.

    `visibility` overrides the visibility of the class, for objects that may be private or shared.
    """
    unit = current()
    emitted = Emitted(
        new_id(),
        event,
        object[0],
        object[1],
        owner,
        visibility or event.visibility,
        actor or unit.entry.actor,
        unit.entry.cause if cause is None else cause,
    )
    unit.events.append(emitted)
    return emitted.id


class SystemAlert(Event, kw_only=True):
    """A condition that an admin should look at."""

    event = "system.alert"
    visibility = "admin"
    area = "settings"

    kind: str
    severity: str  # info | warning | critical
    title: str
    detail: str
    object: dict[str, str] | None = None
    check: str | msgspec.UnsetType = msgspec.UNSET  # kind "health" only: the name of the check, and its status
    status: str | msgspec.UnsetType = msgspec.UNSET
