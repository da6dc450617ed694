"""G-Search and P-Sigmoid (arXiv 2412.00556): search the fraction of visual tokens that each layer gets."""
