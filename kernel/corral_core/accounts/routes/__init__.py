"""HTTP routes: one thin handler function per endpoint."""
