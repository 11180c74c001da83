"""Expressions and templates in CEL, for the configurations that people write."""
