"""Workflows: graphs of steps that run to completion despite crashes."""
