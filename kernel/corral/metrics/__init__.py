"""Histograms, and the counters of the request path."""
