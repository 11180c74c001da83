"""The `tools` plugin: the actions that agents may take."""
