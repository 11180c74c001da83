"""Writes archives, reads them, and restores installations from them."""
