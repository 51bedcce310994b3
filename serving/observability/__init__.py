"""What a running server tells: metrics, logs, traces, and whether it still finds what exact search finds."""
