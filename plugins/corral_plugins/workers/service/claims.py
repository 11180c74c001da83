"""Claiming: the worker's side of what `tasks` decides, and the figures about it."""

from __future__ import annotations

import time
from collections import Counter

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Unavailable
from corral.http.answers import Wait
from corral.metrics.histogram import Histogram
from corral_plugins.tasks.api import CLAIM_TOPICS, SIGNAL_TOPICS, ClaimAnswer, Tasks
from corral_plugins.workers.service import rows
from corral_plugins.workers.service.presence import Presence
from corral_plugins.workers.service.shapes import ClaimBody

REASONS = ("ok", "none", "at_capacity", "draining", "budget_exhausted", "kill_switch")


class ClaimFigures:
    """Answers to claims by reason, and how long they took. Changed on the loop only."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.seconds = Histogram()

    def count(self, reason: str, seconds: float) -> None:
        """One answered claim."""
        self.answers[reason] += 1
        self.seconds.observe(seconds)


class Claims:
    """One a kernel."""

    tasks: Tasks | None

    def __init__(self, presence: Presence, figures: ClaimFigures) -> None:
        self._presence, self._figures = presence, figures

    def claim(self, worker_id: str, wanted: ClaimBody, *, caller: Principal) -> ClaimAnswer | Wait:
        """Lease what there is; a `Wait` while there is nothing, until `wanted.until`. `plugin_disabled`: no tasks."""
        rows.require_self(worker_id, caller)
        if self.tasks is None:
            raise Unavailable("The plugin tasks is out of service.", code="plugin_disabled", retry_after=60)
        began = time.perf_counter()
        self._presence.alive(worker_id)
        agents = None if wanted.agent_ids is None else [each.lower() for each in wanted.agent_ids]
        answer = self.tasks.claim(worker_id, max_tasks=wanted.max_tasks, agent_ids=agents)
        if not answer.tasks and wanted.wait_seconds and clock.time_s() < wanted.until:
            return Wait(_topics(worker_id, answer.reason), wanted.until)
        seconds = time.perf_counter() - began
        after_commit(lambda: self._figures.count(answer.reason, seconds))
        return answer


def _topics(worker_id: str, reason: str) -> tuple[str, ...]:
    """What may make something claimable; for a full or draining worker only what happens to itself."""
    if reason in ("at_capacity", "draining"):
        return (worker_id, *SIGNAL_TOPICS)
    return (worker_id, *CLAIM_TOPICS)
