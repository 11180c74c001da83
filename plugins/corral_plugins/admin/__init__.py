"""Administration: user accounts and their permissions, and the kill switch."""
