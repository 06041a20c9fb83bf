"""Starts a job again after a fault."""
