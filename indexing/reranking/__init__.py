"""Second looks at the hits of a search, one file per method."""
