"""Workflows: graphs of steps that run to the end whatever crashes."""
