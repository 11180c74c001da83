"""Agents: named configurations that claim tasks."""
