"""Batches -> checkpoint: rank losses, the two-pass large batch, the training loop."""
