"""The templates of a new plugin's distribution, and what writes it."""
