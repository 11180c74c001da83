"""The command line of scripts that generate files in the source tree from the built-in plugins.

With `--write`, the script updates the files; otherwise it only compares them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from corral.asgi.application import Application
from corral.cli.command_kernels import temporary_kernel
from corral.config.reader import load as load_config


@contextlib.contextmanager
def temporary_application() -> Iterator[Application]:
    """Yield an application with all built-in plugins in a temporary folder, independent of the environment.

    Raise `RuntimeError` if a plugin does not start, because the generated files would be incomplete.
    """
    with temporary_kernel(load_config({}, path=Path(os.devnull))) as kernel:
        application = Application(kernel)
        down = [f"{item.name}: {item.reason}" for item in kernel.plugins if item.found.built_in and not item.active]
        if down:
            raise RuntimeError("; ".join(down))
        yield application


def outdated(files: Mapping[Path, str]) -> list[Path]:
    """Return the paths of the generated files that are missing or out of date."""
    return [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]


def main(files: Callable[[], Mapping[Path, str]]) -> None:
    """Run the command: compare or write the files, print one line per outdated file, and exit.

    The exit status is 1 if files are outdated and `--write` is not given, otherwise 0.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="rewrite the outdated generated files")
    write, made = parser.parse_args().write, files()
    found = outdated(made)
    for path in found:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], "utf-8")
        sys.stdout.write(f"{path} {'written' if write else 'is outdated: run with --write'}\n")
    sys.exit(1 if found and not write else 0)
