"""Hosts of a job, preflight checks and supervisor."""
