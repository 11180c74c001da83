"""An installation holds every file of the source folders. The editable one that the other tests run in hides a gap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_installation_holds_every_file(tmp_path: Path) -> None:
    """`build_py` copies what goes into the wheel."""
    target = tmp_path / "build"
    commands = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(target)]
    done = subprocess.run([sys.executable, "setup.py", *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        ["git", "ls-files", "-z", "kernel", "plugins", "marketplace"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    tracked = [ROOT / path for path in listed.stdout.rstrip("\0").split("\0")]
    names = [path.relative_to(ROOT).relative_to(path.relative_to(ROOT).parts[0]) for path in tracked if path.exists()]
    assert [str(name) for name in names if not (target / name).exists()] == []
