"""Turn text files into token sequences on every rank."""
