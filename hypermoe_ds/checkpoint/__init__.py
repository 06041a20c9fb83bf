"""Save, find, load and delete checkpoints."""
