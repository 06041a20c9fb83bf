"""Training: settings, the DeepSpeed configuration and engine, the loop and its state."""
