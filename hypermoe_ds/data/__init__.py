"""Data: from files of text to token sequences on every rank."""
