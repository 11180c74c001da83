"""Templates for the distribution package of a new plugin, and a function that writes the package to disk."""
