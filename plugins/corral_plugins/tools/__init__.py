"""The plugin `tools`: the actions that agents may take."""
