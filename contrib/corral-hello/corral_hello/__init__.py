"""A minimal but complete example plugin for Corral."""
