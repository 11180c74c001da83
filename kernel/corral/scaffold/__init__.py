"""Templates for the distribution of a new plugin, and a function that writes the distribution."""
