"""Measures of models beside each other: plain dicts out, each with its setting and its count."""
