"""The secrets vault: stores encrypted, versioned credentials, to which other plugins refer by name."""
