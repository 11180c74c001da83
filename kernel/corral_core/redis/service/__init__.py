"""The Redis clients for connections, notifications, the job queue and rate-limit buckets."""
