"""The model as others use it: Hugging Face folders."""
