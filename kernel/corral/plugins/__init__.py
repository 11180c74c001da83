"""Discovers, loads and wires plugins, and isolates plugins that fail."""
