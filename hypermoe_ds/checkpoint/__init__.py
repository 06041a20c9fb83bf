"""Save, find, load and prune checkpoints."""
