"""Tools: the actions that agents may take."""
