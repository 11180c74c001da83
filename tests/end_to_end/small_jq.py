"""The part of `jq` that the documentation uses for legibility, so that the tests need nothing installed."""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = """#!{python} -IS
import json, re, sys
text = sys.stdin.read()
value, raw, program = json.loads(text), "-r" in sys.argv, sys.argv[-1]
if program.startswith("{{"):
    value = {{name: value[name] for name in re.findall(r"\\w+", program)}}
else:
    for name, index in re.findall(r"\\.(\\w+)|\\[(\\d+)\\]", program):
        value = value[name] if name else value[int(index)]
print(value if raw and isinstance(value, str) else json.dumps(value))
"""


def install_jq(folder: Path) -> None:
    """Write the program `jq` to a folder, which is to come first in `PATH`."""
    program = folder / "jq"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
