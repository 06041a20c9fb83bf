"""One page that shows runs and compares them."""
