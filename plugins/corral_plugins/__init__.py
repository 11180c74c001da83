"""The built-in feature areas, one package each."""
