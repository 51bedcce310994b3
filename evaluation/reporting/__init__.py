"""What an evaluation looks like on disk: a folder with numbers, rows to quote, and a page that needs no network."""
