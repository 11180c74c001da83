"""The test kit for plugin authors: a kernel, a client, a clock, recorded events and real database servers."""
