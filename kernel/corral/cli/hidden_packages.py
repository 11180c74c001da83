"""Hides optional packages that this process does not use from libraries that would import them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """Hide these packages from modules that are imported in the `with` block, unless they have already been imported.

    After the block, the packages can be imported as usual.
    """
    hidden: dict[str, None] = dict.fromkeys(name for name in packages if name not in sys.modules)
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is how Python itself marks a module as missing
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
