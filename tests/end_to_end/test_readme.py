"""What the README tells a new user to type, typed: its shell blocks run as they stand against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from corral.testing.server import ServerProcess

README = Path(__file__).parents[2] / "README.md"

# The README uses jq for legibility; this is the part of jq that it uses, so that the test needs nothing installed.
JQ = """#!{python} -IS
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


def blocks(section: str) -> list[str]:
    """The shell blocks under a heading."""
    text = README.read_text("utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    jq = folder / "jq"
    jq.write_text(JQ.format(python=sys.executable))
    jq.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(script: str, server: ServerProcess, environ: dict[str, str]) -> str:
    script = script.replace("http://127.0.0.1:8000", server.address)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, env=environ, timeout=90
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_with_curl_alone_a_task_is_done(tmp_path: Path, shell: dict[str, str]) -> None:
    server = ServerProcess(
        tmp_path, arguments=(), environ={"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    )
    first, stream = blocks("With curl alone")[:2]
    with server:
        out = run(first, server, shell)
        assert '"role":"admin"' in out
        last = json.loads(out[out.rindex('{"status"') :])
        assert (last["status"], last["attempt"]) == ("completed", 1)
        assert "Hello, world" in last["result"]["text"]
        login = first[: first.index("AGENT=")].replace("curl -s $API/auth/register", "true")
        stream = stream.strip().replace("completed", "completed&after=0")
        heard = run(f"{login}\ngrep -m 1 ^event: < <(timeout 5 {stream} 2>/dev/null)", server, shell)
        assert "event: task.completed" in heard


def test_a_worker_by_hand_does_a_task(tmp_path: Path, shell: dict[str, str]) -> None:
    server = ServerProcess(
        tmp_path, environ={"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": ""}
    )
    first, by_hand = blocks("With curl alone")[0], blocks("A worker by hand")[0]
    create, _, _ = first.partition('curl -s "$API/tasks/$TASK?wait=30"')
    with server:
        out = run(f'{create}\n{by_hand}\necho; curl -s $API/tasks/$TASK -H "$AUTH"', server, shell)
        last = json.loads(out[out.rindex('{"id"') :])
        assert (last["status"], last["result"]) == ("completed", {"text": "done by hand"})
