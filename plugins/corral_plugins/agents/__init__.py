"""Agents: named configurations with which workers run tasks."""
