"""Index -> HTTP API and search page."""
