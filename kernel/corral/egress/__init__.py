"""The egress guard. Corral connects to user-supplied addresses only through it."""
