"""Support for Redis or Valkey (`[redis] url`): wake-up notifications, a queue of job ids, and shared rate limits.

The database remains the source of truth: a notification or an id that Redis loses is found by polling.
"""
