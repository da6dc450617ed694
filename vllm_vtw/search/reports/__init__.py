"""What the searches tell people: HTML pages, tables and notes."""
