"""Connections to Redis, and the notifications, the job queue and the rate-limit buckets that use them."""
