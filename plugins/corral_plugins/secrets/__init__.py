"""The secrets vault: encrypted, versioned credentials that are used by name."""
