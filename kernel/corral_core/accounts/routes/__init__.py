"""HTTP: thin, one function an endpoint."""
