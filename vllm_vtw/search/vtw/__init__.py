"""VTW (arXiv 2405.05803): one withdrawal layer K, calibrated on samples."""
