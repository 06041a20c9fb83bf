"""How ranks share the work: batch and expert arithmetic, expert parallelism, the parallelised model."""
