"""Histograms, and metrics of HTTP requests, plugin errors and events."""
