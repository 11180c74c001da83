"""Runs the `corral` command for `python -m corral`."""

from __future__ import annotations

from corral.cli import main

if __name__ == "__main__":
    main()
