"""Metrics about plugins in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corral.plugins.guard import Guard
from corral.plugins.record import PluginRecord
from corral.watchdog import Watchdog


def plugin_metric_lines(plugins: Iterable[PluginRecord], guards: Iterable[Guard], watchdog: Watchdog) -> Iterator[str]:
    """Yield the lines of all plugin metrics.

    The metrics are the state of each plugin, the time spent in contributed callables, and the number of threads that
    are still running although their call timed out. When the metrics of several processes are added up, the state
    metric is the number of processes in which a plugin is in a given state.
    """
    yield "# HELP corral_plugin_state Number of processes in which the plugin is in this state."
    yield "# TYPE corral_plugin_state gauge"
    for record in plugins:
        yield f'corral_plugin_state{{plugin="{record.name}",state="{record.state}"}} 1'
    yield "# HELP corral_plugin_call_seconds Time spent in calls to callables that plugins contribute, in seconds."
    yield "# TYPE corral_plugin_call_seconds summary"
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for guard in guards:
        key = (guard.plugin, guard.hook)
        count, seconds = sums.get(key, (0, 0.0))
        sums[key] = (count + guard.calls, seconds + guard.seconds)
    for (plugin, hook), (count, seconds) in sorted(sums.items()):
        yield f'corral_plugin_call_seconds_count{{plugin="{plugin}",hook="{hook}"}} {count}'
        yield f'corral_plugin_call_seconds_sum{{plugin="{plugin}",hook="{hook}"}} {seconds:.6f}'
    yield "# HELP corral_plugin_lost_threads Number of threads that have not returned from a plugin."
    yield "# TYPE corral_plugin_lost_threads gauge"
    for name, count in sorted(watchdog.lost_threads().items()):
        yield f'corral_plugin_lost_threads{{plugin="{name}"}} {count}'
