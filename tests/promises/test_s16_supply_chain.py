"""S16: no secret in the repository, and no dependency whose licence does not suit the product's.

The other half, known vulnerabilities and static checks, is `tox run -e audit`: it needs a network.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from corral.redact.patterns import BUILT_IN

ROOT = Path(__file__).parents[2]
EXTRAS = ("fast", "local", "postgres")
# The tests of the redactor are made of what looks like a secret; elsewhere each has its reason.
MADE_UP = ("tests/kernel/redact/",)
EXCUSED = frozenset({"eyJhbGciOiJIUzI1NiJ9." + "e30.x"})  # a token of no claims and no signature
WORDS = ("header", "url_password")  # kinds that are told by a word before them: documents are full of these
NAMES = "MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|Zlib|0BSD|CC0|LGPL|Lesser|EPL|Eclipse"
SUITS = re.compile(rf"\b({NAMES})\b", re.IGNORECASE)
WHOLE = re.compile(r"\bA?GPL|General Public", re.IGNORECASE)  # asks for the source of the whole
BUT = re.compile(r"Lesser|LGPL|\bOR\b", re.IGNORECASE)
READ = {"peewee": "MIT"}  # whose metadata tell nothing


def tracked() -> list[Path]:
    """The files of the repository; of an unpacked archive, all that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(part[0] == "." for part in path.parts[1:])]


def secrets(text: str) -> Iterator[tuple[str, str]]:
    """What the redactor would take out of this text, with its kind."""
    for pattern in BUILT_IN:
        for anchor in pattern.anchors if pattern.kind not in WORDS else ():
            start = text.find(anchor)
            while start >= 0:
                found = pattern.find(text, start)
                if found is not None and text[slice(*found)] not in EXCUSED:
                    yield pattern.kind, text[slice(*found)]
                start = text.find(anchor, start + 1)


def test_s16_no_secret_is_in_the_repository() -> None:
    found, files = [], 0
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        files += 1
        if not name.startswith(MADE_UP):
            found += [f"{name}: {kind} {secret[:12]}…" for kind, secret in secrets(text)]
    print(f"S16: {files} files, {len(found)} secrets")
    assert files > 300
    assert found == []


@pytest.mark.parametrize("secret", ["AKIA" + "ABCDEFGHIJKLMNOP", "ghp_" + "a1B2" * 9, "crl_" + "0123456789abcdefXYZ"])
def test_s16_a_secret_would_be_found(secret: str) -> None:
    assert [kind for kind, _ in secrets(f'key = "{secret}"\n')] != []


def needed() -> dict[str, Distribution]:
    """What the product brings with it: its requirements, theirs, and so on, with every extra that is installed."""
    found: dict[str, Distribution] = {}
    wanted = [Requirement(f"corral[{','.join(EXTRAS)}]")]
    while wanted:
        requirement = wanted.pop()
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:  # of an extra that is not installed, or of another system
            continue
        known = requirement.name.lower() in found
        found[requirement.name.lower()] = installed
        for line in () if known and not requirement.extras else installed.requires or ():
            each = Requirement(line)
            extras = ("", *requirement.extras)
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(each)
    return found


def licence(of: Distribution) -> str:
    """What its metadata say: the expression, the classifiers, or the first line of the text."""
    told = [of.metadata.get("License-Expression") or ""]
    told += [each for each in of.metadata.get_all("Classifier") or () if each.startswith("License ::")]
    told += [(of.metadata.get("License") or "").strip().partition("\n")[0]]
    return "; ".join(each for each in told if each)


def test_s16_every_licence_suits() -> None:
    """Permissive, or of a kind that ends at its own files; none that would ask for the source of the whole."""
    found = {name: READ.get(name) or licence(each) for name, each in needed().items()}
    print(f"S16: {len(found)} dependencies with their licences")
    assert len(found) > 30
    assert {name: told for name, told in found.items() if not SUITS.search(told)} == {}
    assert {name: told for name, told in found.items() if WHOLE.search(told) and not BUT.search(told)} == {}
