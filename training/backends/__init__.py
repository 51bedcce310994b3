"""Training back ends: one step on the global batch, with weights whole or spread over the processes."""
