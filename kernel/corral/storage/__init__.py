"""Bytes that live outside the database: the BlobStore protocol and the local folder."""
