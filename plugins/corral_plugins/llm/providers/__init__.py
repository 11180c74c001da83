"""The kinds of providers that the gateway includes."""
