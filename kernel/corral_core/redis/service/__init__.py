"""The clients of the Redis server: connections, notifications, job queue and rate-limit buckets."""
