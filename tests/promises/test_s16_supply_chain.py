"""S16: no secret in the repository, and no dependency whose licence does not suit the product's.

The other half, known vulnerabilities and static checks, is `tox run -e audit`: it needs a network, or a copy of the
database (`-- --advisories FOLDER`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests import audit

from corral.redact.patterns import BUILT_IN

ROOT = Path(__file__).parents[2]
EXTRAS = ("fast", "local", "notify", "postgres")
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
    told = [*(of.metadata.get_all("License-Expression") or ())]
    told += [each for each in of.metadata.get_all("Classifier") or () if each.startswith("License ::")]
    told += [each.strip().partition("\n")[0] for each in of.metadata.get_all("License") or ()]
    return "; ".join(each for each in told if each)


def test_s16_every_licence_suits() -> None:
    """Permissive, or of a kind that ends at its own files; none that would ask for the source of the whole."""
    found = {name: READ.get(name) or licence(each) for name, each in needed().items()}
    print(f"S16: {len(found)} dependencies with their licences")
    assert len(found) > 30
    assert {name: told for name, told in found.items() if not SUITS.search(told)} == {}
    assert {name: told for name, told in found.items() if WHOLE.search(told) and not BUT.search(told)} == {}


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([{"introduced": "0"}], audit.VULNERABLE),
        ([{"introduced": "0"}, {"fixed": "{here}"}], 0),
        ([{"introduced": "0"}, {"last_affected": "{here}"}], audit.VULNERABLE),
        ([{"introduced": "0"}, {"fixed": "0.1"}, {"introduced": "{here}"}, {"fixed": "9999"}], audit.VULNERABLE),
        ([{"introduced": "9999"}], 0),
    ],
)
def test_s16_a_vulnerable_version_is_found_in_a_copy_of_the_advisories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], events: list[dict[str, str]], status: int
) -> None:
    here = distribution("quart").version
    told = [{kind: at.format(here=here) for kind, at in each.items()} for each in events]
    affected = [{"package": {"ecosystem": "PyPI", "name": "Quart"}, "ranges": [{"type": "ECOSYSTEM", "events": told}]}]
    advisory = {"id": "PYSEC-2026-1", "modified": "2026-11-01T00:00:00Z", "affected": affected}
    (tmp_path / "vulns" / "quart").mkdir(parents=True)
    (tmp_path / "vulns" / "quart" / "PYSEC-2026-1.yaml").write_text(json.dumps(advisory))
    assert audit.main(["--advisories", str(tmp_path)]) == status
    assert ("PYSEC-2026-1" in (out := capsys.readouterr().out)) is (status != 0)
    assert "1 advisories, the newest of 2026-11-01" in out


@pytest.mark.parametrize(("affected", "status"), [("<={here}", audit.VULNERABLE), ("<{here}", 0), (">{here},<9999", 0)])
def test_s16_a_vulnerable_version_is_found_in_a_copy_of_ranges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], affected: str, status: int
) -> None:
    range_ = affected.format(here=distribution("quart").version)
    (tmp_path / "data").mkdir()
    known = {"$meta": {"timestamp": 1775023247}, "Quart": [range_], "not-installed-here": [">=0"]}
    (tmp_path / "data" / "insecure.json").write_text(json.dumps(known))
    assert audit.main(["--advisories", str(tmp_path)]) == status
    assert (f"versions {range_}" in (out := capsys.readouterr().out)) is (status != 0)
    assert "2 advisories, the newest of 2026-04-01" in out


def test_s16_of_two_copies_each_must_be_clean(tmp_path: Path) -> None:
    for name, ranges in (("clean", ["<0.0.1"]), ("vulnerable", [">=0"])):
        (tmp_path / name / "data").mkdir(parents=True)
        known = {"$meta": {"timestamp": 1775023247}, "quart": ranges}
        (tmp_path / name / "data" / "insecure.json").write_text(json.dumps(known))
    copies = [each for name in ("vulnerable", "clean") for each in ("--advisories", str(tmp_path / name))]
    assert audit.main(copies) == audit.VULNERABLE
    assert audit.main(copies[2:]) == 0


def test_s16_a_folder_without_advisories_is_not_an_audit(tmp_path: Path) -> None:
    assert audit.main(["--advisories", str(tmp_path)]) == audit.NOT_AUDITED
    (tmp_path / "vulns").mkdir()
    assert audit.main(["--advisories", str(tmp_path)]) == audit.NOT_AUDITED
