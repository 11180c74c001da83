"""Files outside the database: the `BlobStore` protocol."""
