"""Workflows: graphs of steps that run to the end in spite of crashes."""
