"""Vectors -> a published version: in stages, each of which continues where a killed process stopped."""
