"""A teacher over HTTP."""
