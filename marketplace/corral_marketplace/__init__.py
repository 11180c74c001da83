"""The template catalogue: the JSON manifests of the templates, their schema, and functions that read them."""
