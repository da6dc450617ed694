"""G-Search and P-Sigmoid: a fraction of the visual tokens for each layer."""
