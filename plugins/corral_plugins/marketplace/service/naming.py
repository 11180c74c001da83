"""Chooses names for new objects, so that no two objects of the same kind have the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import NamedTuple

from corral_plugins.marketplace.api import Installer

AT_A_TIME = 10


class WantedName(NamedTuple):
    """The desired name for a new object, and the kind of the object."""

    kind: str
    name: str


def existing_ids(wanted: Sequence[WantedName], installers: Mapping[str, Installer]) -> dict[WantedName, str]:
    """Return the ids of existing objects that have one of the desired names, keyed by desired name."""
    found: dict[WantedName, str] = {}
    for kind in {each.kind for each in wanted}:
        names = [each.name for each in wanted if each.kind == kind]
        found |= {WantedName(kind, name): id for name, id in installers[kind].find_existing(names).items()}
    return found


def free_names(wanted: Sequence[WantedName], installers: Mapping[str, Installer]) -> list[str]:
    """Return an unused name for each desired name: the name itself, or a variant such as `name (2)`."""
    chosen: dict[int, str] = {}
    taken: set[WantedName] = set()
    candidates = {index: _candidates(each.name, installers[each.kind].name_length) for index, each in enumerate(wanted)}
    while len(chosen) < len(wanted):
        offered = {
            index: list(islice(candidates[index], AT_A_TIME)) for index in range(len(wanted)) if index not in chosen
        }
        asked = [WantedName(wanted[index].kind, name) for index, names in offered.items() for name in names]
        taken |= existing_ids(asked, installers).keys()
        for index, names in offered.items():
            kind = wanted[index].kind
            free = next((name for name in names if WantedName(kind, name) not in taken), None)
            if free is not None:
                chosen[index] = free
                taken.add(WantedName(kind, free))
    return [chosen[index] for index in range(len(wanted))]


def _candidates(name: str, length: int) -> Iterator[str]:
    yield name
    for number in count(2):
        suffix = f" ({number})"
        yield name[: length - len(suffix)].rstrip() + suffix
