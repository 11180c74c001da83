"""Files outside the database: the `BlobStore` protocol, and the store in a local folder."""
