"""The `vtw` command, one file for each of its commands."""
