"""HTTP of security."""
