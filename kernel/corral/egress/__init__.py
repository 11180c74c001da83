"""The egress guard: the one way in which Corral opens connections to addresses that somebody gave it."""
