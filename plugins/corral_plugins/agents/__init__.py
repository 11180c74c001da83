"""Agents: named configurations under which workers run tasks."""
