"""Integer weights, and the graphs that compute with them."""
