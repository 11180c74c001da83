"""Histograms, and the metrics of HTTP requests."""
