"""The `local_storage` plugin, which stores files in a folder of this machine."""
