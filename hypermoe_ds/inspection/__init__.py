"""Report the contents of a model folder and the differences between two folders."""
