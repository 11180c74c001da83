"""Redis or Valkey for `[redis] url`: a bell and a queue of ids between processes, neither of which holds the truth."""
