"""The rules of the vault; the only writers of its tables."""
