"""Checkpoint + shards -> embeddings -> searchable FAISS index."""
