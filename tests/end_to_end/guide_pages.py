"""The pages of documentation whose commands the tests run: their fenced blocks, and a shell in which they run.

`sh` blocks run in the order of the page, in one shell. A `text` block shows what the `sh` block before it prints, where
`…` stands for anything; if it begins with `corral: ` or `failed: `, the `sh` block fails. A `console` block, whose
commands have a prompt, is not run with the others. A block of another language is a file, and its first line is a
comment with the path of the file.
"""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
FILES = ("dockerfile", "ini", "caddyfile", "json", "nginx", "python", "toml")
END_OF_BLOCK = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def path(self) -> str:
        """The path that the first line of a file names."""
        return self.text.partition("\n")[0].lstrip("# ").strip()


@dataclass(frozen=True)
class Run:
    """An `sh` block that has run, and what it printed."""

    block: Block
    expected: Block | None
    output: str


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, those in lists included."""
    found = FENCE.finditer(page.read_text("utf-8"))
    return [Block(match["language"], textwrap.dedent(match["text"])) for match in found]


def files_of(page: Path) -> dict[str, str]:
    """Return the files that a page shows, by path."""
    return {block.path: block.text for block in blocks_of(page) if block.language in FILES}


def commands_of(page: Path) -> list[tuple[Block, Block | None]]:
    """Return the `sh` blocks of a page, each with the `text` block that shows what it prints."""
    blocks = blocks_of(page)
    following = [*blocks[1:], None]
    return [
        (block, after if after is not None and after.language == "text" else None)
        for block, after in zip(blocks, following, strict=True)
        if block.language == "sh"
    ]


def console_lines(page: Path) -> list[str]:
    """Return the commands that a page shows with a prompt."""
    text = "".join(block.text for block in blocks_of(page) if block.language == "console")
    return [line.removeprefix("$ ") for line in text.replace("\\\n", "").splitlines() if line.startswith("$ ")]


def run_page(page: Path, *, folder: Path, environ: Mapping[str, str], addresses: Mapping[str, str]) -> list[Run]:
    """Run the commands of a page in a folder, where the files of the page are that have no absolute path.

    Addresses that the page names are replaced by those of the test.
    """
    commands = commands_of(page)
    for path, text in files_of(page).items():
        if not path.startswith("/") and not (folder / path).exists():
            (folder / path).write_text(text)
    lines = ["set -euo pipefail"]
    for block, shown in commands:
        text = block.text
        for named, address in addresses.items():
            text = text.replace(named, address)
        fails = shown is not None and shown.text.startswith(("corral: ", "failed: "))
        lines.append(f"set +e\n{text}\nstatus=$?; set -e; test $status -ne 0" if fails else text)
        lines.append(f"printf '{END_OF_BLOCK}'")
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    outputs = done.stdout.split(END_OF_BLOCK)
    assert done.returncode == 0, f"{commands[len(outputs) - 1][0].text}\n{outputs[-1]}"
    return [Run(*command, output) for command, output in zip(commands, outputs, strict=False)]


def missing_lines(run: Run) -> list[str]:
    """Return the lines that the page shows below a block, but that the block did not print."""
    printed = [" ".join(line.split()) for line in run.output.splitlines()]
    missing = []
    for line in run.expected.text.splitlines() if run.expected is not None else ():
        parts = [re.escape(" ".join(part.split())) for part in line.split("…")]
        pattern = re.compile(r"\s*.*?\s*".join(parts))
        if line.strip() and not any(pattern.fullmatch(one) for one in printed):
            missing.append(line)
    return missing
