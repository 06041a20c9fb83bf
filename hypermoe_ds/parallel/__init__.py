"""Parallelism: layout of batches and experts over ranks, expert parallelism, and the DeepSpeed engine."""
