"""The rules about files, and where their bytes are kept."""
