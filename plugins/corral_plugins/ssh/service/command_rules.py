"""The command rules of connections, which protect against mistakes.

They can be circumvented. Only the permissions of the remote account are a real limit.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Sequence

from corral.errors import Forbidden

_SEPARATORS = re.compile(r"&&|\|\||[;|&\n\r]")
_BEYOND_PATTERNS = re.compile(r"\$\(|`|[<>]")


def quote_argv(argv: Sequence[str]) -> str:
    """Return a POSIX shell command line that runs a program with exactly these arguments."""
    return shlex.join(argv)


def check_command(command: str, *, allowed: Sequence[str], denied: Sequence[str]) -> None:
    """Raise `Forbidden` (`command_denied`) if the rules forbid a command line.

    Each part between `;`, `&&`, `||`, `|`, `&` and line breaks is matched separately. Consecutive spaces or tabs count
    as one space. Denied patterns take precedence over allowed patterns. If there are allowed patterns, each part must
    match one of them. In that case, command substitution and redirections are also refused, because they would run
    commands or write files that no pattern has matched.
    """
    parts = [" ".join(part.split()) for part in _SEPARATORS.split(command)]
    parts = [part for part in parts if part]
    for part in (*parts, " ".join(command.split())):
        for pattern in denied:
            if _matches(part, pattern):
                raise _denied_error(f"denied_commands contains {pattern!r}.")
    if not allowed:
        return
    if _BEYOND_PATTERNS.search(command):
        raise _denied_error("With allowed_commands, command substitution and redirections are not allowed.")
    for part in parts:
        if not any(_matches(part, pattern) for pattern in allowed):
            raise _denied_error(f"No pattern of allowed_commands matches {part[:200]!r}.")


def _matches(part: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(part, " ".join(pattern.split()))


def _denied_error(detail: str) -> Forbidden:
    return Forbidden(detail, code="command_denied")
