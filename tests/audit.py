"""`python -m tests.audit`: the installed dependencies against what is known of vulnerabilities.

By default `pip-audit` asks the index. `--advisories FOLDER` reads a copy of the Python Packaging Advisory Database
(github.com/pypa/advisory-database) or of Safety DB (github.com/pyupio/safety-db) instead, and says of which day its
newest advisory is: for machines without a network, and for an index that is a mirror. Given more than once, every copy
must be clean. `--offline` leaves it out and says so.

Ends with 0 only when every dependency was looked up and none is known to be vulnerable, with 1 when one is, and with 3
when nothing was looked up: what was not audited is not clean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

OWN = frozenset({"corral", "corral-hello", "corral-llama"})
VULNERABLE, NOT_AUDITED = 1, 3


class Fault(NamedTuple):
    """A known vulnerability of an installed version."""

    package: str
    version: str
    id: str
    fixed: list[str]


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit")
    parser.add_argument("--offline", action="store_true", help="look nothing up, and say so")
    parser.add_argument(
        "--advisories",
        type=Path,
        metavar="FOLDER",
        action="append",
        help="a copy of pypa/advisory-database or of pyupio/safety-db; may be given more than once",
    )
    options = parser.parse_args(arguments)
    found = {str(canonicalize_name(each.metadata["Name"])): each.version for each in distributions()}
    installed = {name: version for name, version in found.items() if name not in OWN}
    if options.advisories:
        return max(_from_copy(folder, installed) for folder in options.advisories)
    if options.offline:
        print(f"S16: --offline: {len(installed)} dependencies were NOT audited")
        return 0
    return _from_index()


def _from_copy(folder: Path, installed: Mapping[str, str]) -> int:
    vulns, ranges = folder / "vulns", folder / "data" / "insecure.json"
    if ranges.is_file():
        return _from_ranges(json.loads(ranges.read_bytes()), installed)
    if not vulns.is_dir():
        print(f"S16: {folder} is no copy of a database (no vulns, no data/insecure.json): NOTHING was audited")
        return NOT_AUDITED
    advisories = [each for path in sorted(vulns.rglob("*.yaml")) for each in _read(path)]
    newest = max((str(each.get("published") or each["modified"]) for each in advisories), default="no day")[:10]
    return _judge(
        [fault for each in advisories for fault in _hits(each, installed)], installed, len(advisories), newest
    )


def _from_ranges(known: dict[str, Any], installed: Mapping[str, str]) -> int:
    """Safety DB: by package the ranges of versions that are vulnerable; it has no identifiers."""
    made = datetime.fromtimestamp(known.pop("$meta")["timestamp"], UTC)
    faults = [
        Fault(name, installed[name], f"versions {affected}", [])
        for told, ranges in known.items()
        if (name := str(canonicalize_name(told))) in installed
        for affected in ranges
        if SpecifierSet(affected).contains(installed[name], prereleases=True)
    ]
    return _judge(faults, installed, sum(map(len, known.values())), f"{made:%Y-%m-%d}")


def _judge(faults: list[Fault], installed: Mapping[str, str], advisories: int, newest: str) -> int:
    _tell(faults)
    print(
        f"S16: {len(installed)} dependencies against {advisories} advisories, the newest of {newest}: "
        f"{len(faults)} known vulnerabilities"
    )
    return VULNERABLE if faults else 0 if advisories else NOT_AUDITED


def _read(path: Path) -> Iterator[dict[str, Any]]:
    advisory = yaml.safe_load(path.read_bytes())
    if not advisory.get("withdrawn"):
        yield advisory


def _hits(advisory: Mapping[str, Any], installed: Mapping[str, str]) -> Iterator[Fault]:
    """The schema is OSV's: a version is affected when it is listed, or lies in a range of the ecosystem's order."""
    for affected in advisory.get("affected", ()):
        name = canonicalize_name(affected["package"]["name"])
        version = installed.get(name)
        if version is None:
            continue
        ranges = [each["events"] for each in affected.get("ranges", ()) if each["type"] == "ECOSYSTEM"]
        if version in affected.get("versions", ()) or any(_inside(version, events) for events in ranges):
            fixed = [str(event["fixed"]) for events in ranges for event in events if "fixed" in event]
            yield Fault(name, version, advisory["id"], fixed)


def _inside(version: str, events: list[dict[str, str]]) -> bool:
    """OSV's evaluation: the last event at or below the version decides."""
    steps = sorted((_version(str(at)), kind) for event in events for kind, at in event.items() if kind != "limit")
    affected = False
    for at, kind in steps:
        if at < _version(version) or (at == _version(version) and kind != "last_affected"):
            affected = kind == "introduced"
    return affected


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


def _from_index() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
    done = subprocess.run([*command, "-f", "json"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"S16: pip-audit could not reach its data: NOTHING was audited\n{done.stderr.strip()[-500:]}")
        return NOT_AUDITED
    unknown = sorted(each["name"] for each in found if "skip_reason" in each and each["name"] not in OWN)
    faults = [
        Fault(each["name"], each["version"], fault["id"], fault["fix_versions"])
        for each in found
        for fault in each.get("vulns", ())
    ]
    _tell(faults)
    print(f"S16: {len(found)} dependencies, {len(faults)} known vulnerabilities, {len(unknown)} not audited")
    if unknown:
        print(
            f"  the index has no data of {', '.join(unknown[:10])}{' …' if len(unknown) > 10 else ''}: is it a mirror? "
            "--advisories reads a copy of the database"
        )
    return VULNERABLE if faults else NOT_AUDITED if unknown else 0


def _tell(faults: list[Fault]) -> None:
    for fault in faults:
        print(f"  {fault.package} {fault.version}: {fault.id}, fixed in {', '.join(fault.fixed) or 'no release'}")


if __name__ == "__main__":
    sys.exit(main())
