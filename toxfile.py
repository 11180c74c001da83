"""What `tox.ini` cannot say: `tox` without an environment runs two of them at a time, as `tox --parallel 2` does."""

from __future__ import annotations

from typing import Any

from tox.plugin import impl


@impl
def tox_add_core_config(core_conf: Any, state: Any) -> None:
    """Run the environments of `env_list` in pairs, and show their output while they run."""
    options = state.conf.options
    if options.command == "legacy" and options.env.is_default_list and not options.parallel:
        options.parallel, options.parallel_live = 2, True
