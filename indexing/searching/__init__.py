"""Ways to search one collection of vectors."""
