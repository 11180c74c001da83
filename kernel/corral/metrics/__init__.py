"""Metrics that are counted as things happen: histograms, and the counters of the request path."""
