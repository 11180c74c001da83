"""The public interface of the marketplace: events, and the template sources and installers that plugins contribute.

A template is a JSON document that describes a team of agents, workflows, triggers and other resources. Each kind of
resource belongs to a plugin, which contributes the installer for that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.events.event import Event

Json = dict[str, Any]


class TemplateSource(msgspec.Struct, frozen=True, kw_only=True):
    """A source of templates that a plugin contributes with the hook `corral_template_sources`.

    `manifests()` returns the template manifests as JSON. Each process calls it once, outside units of work.
    """

    name: str
    manifests: Callable[[], Iterable[bytes]]


class InstalledObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object that an installer created.

    `once` contains values that are returned only when the template is installed, such as the URL of a webhook.
    `refused_tools` lists the tools that the template gives to an agent but that the user is not allowed to grant. The
    object was created without these tools. `warnings` contains sentences about what the object still needs in order to
    work.
    """

    id: str
    once: Mapping[str, str] = {}
    refused_tools: Sequence[str] = ()
    warnings: Sequence[str] = ()


class ObjectUse(msgspec.Struct, frozen=True, kw_only=True):
    """An object of the installer's kind that refers to another object. `uses` is the id of the other object."""

    id: str
    name: str
    uses: str


class Installer(msgspec.Struct, frozen=True, kw_only=True):
    """Creates, compares, changes and removes the objects of one kind.

    Plugins contribute installers with the hook `corral_template_installers`. A spec is the description of an object in
    a template, in which parameters are replaced by their values and references by ids.

    `schema` is the JSON Schema of a spec. Its defaults are the values of fields that a template omits. `write` and
    `read` are the permissions that users need to install and to export such an object. `name_length` is the maximum
    length of an object's name.

    `check_spec(spec)` raises `Invalid`, with pointers relative to the spec, if no object with this spec could be
    created. It runs in a thread, outside units of work, and receives placeholder ids. All other functions run in the
    caller's unit of work.

    `find_existing(names)` returns the ids of existing objects, keyed by name. `install(spec, by)` creates an object
    that remains inactive until a person activates it. `read_fields(ids)` returns the current values of the fields that
    a spec may contain, keyed by id. Deleted objects are omitted. `lock(ids)` locks the objects until the end of the
    unit of work, so that nobody can change them after their fields were read. `update(id, fields, by)` changes these
    fields. `find_uses(ids)` returns the objects of this kind that refer to objects with these ids. `find_running(ids)`
    returns the ids of the objects that are running. `remove(id, by)` deletes an object. `export(id, by)` returns the
    spec of an object, and raises `NotFound` if the object does not exist.
    """

    kind: str
    title: str
    schema: Json
    write: str
    read: str
    check_spec: Callable[[Json], None]
    find_existing: Callable[[Sequence[str]], Mapping[str, str]]
    install: Callable[[Json, Principal], InstalledObject]
    read_fields: Callable[[Sequence[str]], Mapping[str, Json]]
    lock: Callable[[Sequence[str]], None]
    update: Callable[[str, Json, Principal], None]
    find_uses: Callable[[Sequence[str]], Sequence[ObjectUse]]
    find_running: Callable[[Sequence[str]], Sequence[str]]
    remove: Callable[[str, Principal], None]
    export: Callable[[str, Principal], Json]
    name_length: int = 100


class InstallerFunctions(Protocol):
    """The functions of an installer as methods. A single object can implement all of them."""

    def check_spec(self, spec: Json, /) -> None: ...

    def find_existing(self, names: Sequence[str], /) -> Mapping[str, str]: ...

    def install(self, spec: Json, by: Principal, /) -> InstalledObject: ...

    def read_fields(self, ids: Sequence[str], /) -> Mapping[str, Json]: ...

    def lock(self, ids: Sequence[str], /) -> None: ...

    def update(self, id: str, fields: Json, by: Principal, /) -> None: ...

    def find_uses(self, ids: Sequence[str], /) -> Sequence[ObjectUse]: ...

    def find_running(self, ids: Sequence[str], /) -> Sequence[str]: ...

    def remove(self, id: str, by: Principal, /) -> None: ...

    def export(self, id: str, by: Principal, /) -> Json: ...


_FUNCTIONS = (
    "check_spec",
    "find_existing",
    "install",
    "read_fields",
    "lock",
    "update",
    "find_uses",
    "find_running",
    "remove",
    "export",
)


def functions_of(implementation: InstallerFunctions) -> dict[str, Any]:
    """Return the methods of `implementation`, keyed by the names of the corresponding `Installer` fields."""
    return {name: getattr(implementation, name) for name in _FUNCTIONS}


class _TemplateEvent(Event, kw_only=True):
    """The fields that all events about installations share."""

    installation_id: str
    slug: str
    by: str | None


class TemplateInstalled(_TemplateEvent, kw_only=True):
    """A template was installed, or an installation was upgraded."""

    event = "template.installed"

    version: str
    upgraded_from: str | None
    created: list[dict[str, str]]


class TemplateUninstalled(_TemplateEvent, kw_only=True):
    """The objects of an installation were removed, except the objects in `kept`."""

    event = "template.uninstalled"

    removed: list[dict[str, str]]
    kept: list[dict[str, str]]


EVENTS: tuple[type[Event], ...] = (TemplateInstalled, TemplateUninstalled)
