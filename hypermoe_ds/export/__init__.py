"""Export models to Hugging Face folders and import models from them."""
