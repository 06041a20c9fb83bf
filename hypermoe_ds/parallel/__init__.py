"""How the ranks share the work: arithmetic of the layout and the expert-parallel transformation."""
