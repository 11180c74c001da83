"""Settings: what is declared, what rules now, and the protocol by which they are changed."""
