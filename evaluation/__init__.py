"""Rankings -> the numbers of the benchmarks, with their uncertainty and their pictures."""
