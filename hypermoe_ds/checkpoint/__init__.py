"""Checkpoints of a run: saving, finding, loading, keeping."""
