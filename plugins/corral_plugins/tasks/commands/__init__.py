"""The commands `corral run`, `corral tasks` and `corral status`."""
