"""The kinds of providers that the gateway comes with."""
