"""Reports of the searches for people to read: HTML pages, tables for the terminal, and notes."""
