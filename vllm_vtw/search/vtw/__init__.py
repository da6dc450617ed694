"""VTW (arXiv 2405.05803): calibrates the withdrawal layer K of a model on samples."""
