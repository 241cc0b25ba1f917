"""A run directory -> one self-contained HTML page and a Markdown card."""
