"""Business logic of the vault. Only this package writes to the vault's tables."""
