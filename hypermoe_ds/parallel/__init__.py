"""Distribute batches and experts over ranks, and turn a model into a DeepSpeed engine."""
