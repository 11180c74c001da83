"""The kernel's mechanism can be read in one sitting, and every file at a glance."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "kernel" / "corral"
BESIDE_THE_MECHANISM = frozenset({"cli", "core", "testing", "scaffold"})
MECHANISM_LINES = 13_400  # a ratchet: it only goes down (docs/adr/0002)
FILE_LINES = 320


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_mechanism_of_the_kernel_is_small() -> None:
    files = [p for p in KERNEL.rglob("*.py") if p.relative_to(KERNEL).parts[0] not in BESIDE_THE_MECHANISM]
    assert sum(map(_lines, files)) <= MECHANISM_LINES


def test_every_file_is_small() -> None:
    files = [path for root in ("kernel", "plugins") for path in (ROOT / root).rglob("*.py")]
    counted = {str(path.relative_to(ROOT)): _lines(path) for path in files if path.parent.name != "migrations"}
    assert {name: lines for name, lines in counted.items() if lines > FILE_LINES} == {}
