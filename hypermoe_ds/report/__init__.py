"""Build an HTML page that shows and compares runs."""
