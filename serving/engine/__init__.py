"""What answers queries, whoever asks: it knows no HTTP."""
