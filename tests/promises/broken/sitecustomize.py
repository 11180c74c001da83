"""Python runs this module at its start where this folder is on its path: it breaks the product, as `breaks.py` says."""

import importlib.util
import os
import traceback
from pathlib import Path

specification = importlib.util.spec_from_file_location("promise_breaks", Path(__file__).parents[1] / "breaks.py")
assert specification is not None
assert specification.loader is not None
breaks = importlib.util.module_from_spec(specification)
specification.loader.exec_module(breaks)
try:
    breaks.apply(breaks.BREAKS[os.environ[breaks.VARIABLE]].edits)
except Exception as error:  # Python would go on after any other error, with a product that is whole
    traceback.print_exc()
    raise SystemExit from error
