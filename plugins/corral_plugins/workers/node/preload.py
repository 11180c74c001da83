"""The modules that the fork server of task processes preloads: the agent loop and everything its first step imports."""

from __future__ import annotations

from corral_plugins.workers.node import agent_loop, gateway_model, tool_run

gateway_model.warm_up_imports()

__all__ = ["agent_loop", "tool_run"]
