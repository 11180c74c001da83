"""Tools: what agents may do besides talking."""
