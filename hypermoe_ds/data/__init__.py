"""Data pipeline: preprocess text files and load token sequences on every rank."""
