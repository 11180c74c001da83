"""Pages of the reference that are made of what plugins declare: run-time settings and events.

`python -m corral.testing.reference --write` brings them up to date; call it at the root of the source tree.
"""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from corral.events.registry import EventType
from corral.plugin import Setting
from corral.settings.values import core_kind, core_type
from corral.testing.written import build, main

FOLDER = Path("docs", "reference")
_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
}
SETTINGS = """\
# Run-time settings

Every setting that a built-in plugin declares, by category. A value in `corral.toml` or the environment pins a setting:
it cannot be changed at run time then.
"""
EVENTS = """\
# Events

Every event that a built-in plugin emits. Visibility: `shared` events are seen by everyone but auditors, `private` ones
by the owner of the object, `private_and_admin` ones by the owner and admins, `admin` ones by admins.
"""


def files(folder: Path = FOLDER) -> dict[Path, str]:
    """The pages with their texts."""
    with build() as application:
        settings = [item.setting for item in application.kernel.settings.all()]
        kinds = application.kernel.event_types.all()
    return {folder / "settings.md": settings_page(settings), folder / "events.md": events_page(kinds)}


def settings_page(settings: Iterable[Setting[Any]]) -> str:
    """A table a category."""
    parts = [SETTINGS]
    for category, members in itertools.groupby(settings, lambda setting: setting.name.partition(".")[0]):
        rows = [(f"`{item.name}`", kind_of(item), _bounds(item), _default(item), _title(item)) for item in members]
        parts += [f"\n## {category}\n\n", _table(("Name", "Type", "Bounds", "Default", "Title"), rows)]
    return "".join(parts)


def events_page(kinds: Iterable[EventType]) -> str:
    """One table."""
    rows = [(f"`{kind.event}`", kind.title, kind.plugin, f"`{kind.visibility}`", _payload(kind)) for kind in kinds]
    return EVENTS + "\n" + _table(("Event", "Title", "Plugin", "Visibility", "Payload"), rows)


def kind_of(setting: Setting[Any]) -> str:
    """The type in words."""
    kind, nullable = core_kind(setting)
    if typing.get_origin(kind) is list:
        item, _ = core_type(typing.get_args(kind)[0])
        text = f"list of {_NAMES.get(item, 'text')}s"
    else:
        text = _NAMES.get(kind, "object")
    return f"{text} or null" if nullable else text


def _bounds(setting: Setting[Any]) -> str:
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    least, most = (f"{bound:,.10g}" if bound is not None else "" for bound in (setting.minimum, setting.maximum))
    if least and most:
        return f"{least} to {most}"
    return f"at least {least}" if least else f"at most {most}" if most else ""


def _default(setting: Setting[Any]) -> str:
    return "secret" if setting.secret else f"`{json.dumps(msgspec.to_builtins(setting.default), ensure_ascii=False)}`"


def _title(setting: Setting[Any]) -> str:
    return f"{setting.title} (from the next start)" if setting.restart_required else setting.title


def _payload(kind: EventType) -> str:
    return ", ".join(f"`{field.encode_name}`" for field in msgspec.structs.fields(kind.payload))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    main(files)
