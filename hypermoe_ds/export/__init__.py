"""Export models to Hugging Face folders and import them from there."""
