"""Who may ask, how much, how slowly, and what the server gets from elsewhere."""
