"""The template catalogue: JSON, its schema and a small reader."""
