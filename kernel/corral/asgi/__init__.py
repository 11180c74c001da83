"""Serves the kernel as a Quart application. Contains the request pipeline and the router."""
