"""The kernel as a Quart application: the request pipeline, and the router that finds the endpoint of a request."""
