"""From text files to token sequences on every rank."""
