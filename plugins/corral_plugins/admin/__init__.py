"""Administration: people and their permissions, and the kill switch."""
