"""Recall, memory and latency wanted -> the index type that delivers them."""
