"""What a run folder says of itself, and runs side by side."""
