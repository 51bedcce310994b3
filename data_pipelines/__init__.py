"""Pictures on disk -> WebDataset shards -> batches."""
