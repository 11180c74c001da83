"""Support for Redis or Valkey (`[redis] url`): wake-up notifications, a queue of job ids, and shared rate limits.

The database remains the source of truth. If Redis loses a notification or a job id, processes find the event or the job
by polling the database.
"""
