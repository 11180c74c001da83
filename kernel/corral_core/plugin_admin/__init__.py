"""Which plugins run, and the API documentation."""
