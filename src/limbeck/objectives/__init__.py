"""Objectives: one loss a file.  ``count(batch)`` comes from the masks; the call gives the sum, and the engine divides once."""
