"""The template catalogue: JSON manifests, their schema and a small reader."""
