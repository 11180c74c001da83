"""What a process was started in. Plugins may change it for all, and who comes after must not begin elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Self


class Surroundings(NamedTuple):
    """The working directory, the environment and the mask of new files' modes."""

    folder: str
    environ: Mapping[str, str]
    mask: int

    @classmethod
    def now(cls) -> Self:
        """As they are."""
        mask = os.umask(0o077)
        os.umask(mask)
        return cls(os.getcwd(), dict(os.environ), mask)

    def restore(self) -> None:
        """Have them as they were: another folder or environment may lead to another configuration and database."""
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environ)
        os.umask(self.mask)
