"""What the fork server of tasks' processes imports: the agent loop with all that its first step needs."""

from __future__ import annotations

from corral_plugins.workers.node import loop, model

model.warm()

__all__ = ["loop"]
