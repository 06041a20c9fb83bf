"""Training: settings, the DeepSpeed configuration and engine, the training loop and its state."""
