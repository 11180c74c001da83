"""Readiness, health checks and metrics."""
