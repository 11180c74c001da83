"""The egress guard, through which Corral makes all connections to user-supplied addresses."""
