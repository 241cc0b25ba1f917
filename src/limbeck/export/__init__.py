"""Formats in which a model leaves the project."""
