"""Each promise that has a test has a break that turns the test red; `pytest tests/promises --break` runs them all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.promises import breaks
from tests.promises.breaks import BREAKS, Break, Verdict, judge, run_broken

pytestmark = pytest.mark.one_engine

HERE = Path(__file__).parent
FIT = """
from tests.promises.breaks import BREAKS, apply
for given in BREAKS.values():
    apply(given.edits)
"""


def test_every_promise_with_a_test_has_a_break() -> None:
    tested = {
        f"{found[1].upper()}{int(found[2])}"
        for path in HERE.glob("test_*.py")
        if (found := re.match(r"test_([rs])(\d+)_", path.name))
    }
    assert set(BREAKS) == tested


def test_every_break_fits_the_source_that_it_changes() -> None:
    done = subprocess.run([sys.executable, "-c", FIT], cwd=breaks.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row", ["S3", "S16"])
def test_a_broken_promise_turns_red(row: str) -> None:
    verdict = run_broken(row, BREAKS[row])
    assert verdict.is_red, verdict.told


@pytest.mark.parametrize(
    ("status", "output", "told"),
    [
        (0, "1 passed in 1.0s", "still green"),
        (1, "E   no database\n1 error in 1.0s", "not a failure of the test: 1 error in 1.0s"),
        (1, "E   no space\n1 failed in 1.0s", "failed for another reason: E   no space"),
        (4, "ERROR: not found: test_x.py", "not a failure of the test: ERROR: not found: test_x.py"),
        (2, "E   no database\n1 failed, 1 error in 1.0s", "not a failure of the test: 1 failed, 1 error in 1.0s"),
    ],
)
def test_what_is_not_the_failure_that_was_meant_does_not_count(status: int, output: str, told: str) -> None:
    assert judge(status, output, "no database") == Verdict(False, told)


def test_a_process_that_cannot_be_broken_does_not_start() -> None:
    environ = {**os.environ, "PYTHONPATH": str(HERE / "broken"), breaks.VARIABLE: "R0"}
    done = subprocess.run([sys.executable, "-c", "print('whole')"], env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""


def test_a_break_that_fits_nothing_is_named() -> None:
    gone = Break("x", "x", "x", [("corral.ids:new_id", "not in the source", "x")])
    with pytest.raises(LookupError, match=r"corral\.ids:new_id contains 'not in the source' 0 times"):
        breaks.apply(gone.edits)
