"""Templates for the distribution of a new plugin, and the function that writes the distribution."""
