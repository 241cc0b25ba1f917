"""Everything that touches transformers: strict loading, structure, heads, packing, caches, generated student classes.

Each touch of a private name of transformers has a canary test in ``tests/unit/test_models_canaries.py``.
"""
