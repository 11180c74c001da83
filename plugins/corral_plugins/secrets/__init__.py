"""The secrets vault, which stores encrypted, versioned credentials. Other plugins refer to credentials by name."""
