"""Report what a model folder holds and how two folders differ."""
