"""Imported by the fork server of task processes: the agent loop with everything that its first step needs."""

from __future__ import annotations

from corral_plugins.workers.node import agent_loop, model

model.warm()

__all__ = ["agent_loop"]
