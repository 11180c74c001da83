"""The `local_storage` plugin, which stores files in a folder on this machine."""
