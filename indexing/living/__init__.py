"""A published index that takes additions and deletions while it serves."""
