"""Business logic of the vault, and the only code that writes to its tables."""
