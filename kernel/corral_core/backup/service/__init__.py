"""Writes and reads archives, and restores installations from them."""
