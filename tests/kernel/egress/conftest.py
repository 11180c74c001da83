"""An egress service, and names that resolve as told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.config.reader import load
from corral.egress.client import Egress
from corral.testing.stub_servers import FakeResolver


@pytest.fixture
def make_egress() -> Callable[..., Egress]:
    """`make_egress(allow=[…], proxy=…, names={…})`."""

    def make(names: Any = None, **options: Any) -> Egress:
        overrides = {f"egress.{name}": value for name, value in options.items()}
        return Egress(load({}, path=Path(os.devnull), overrides=overrides), resolve=FakeResolver(names or {}))

    return make
