"""Parallelism: how ranks share batches and experts, expert parallelism, and the parallelised model."""
