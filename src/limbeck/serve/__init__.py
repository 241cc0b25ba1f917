"""Limbeck as a server.

``refusals``, ``bodies``, ``replies``, ``gate``, ``metrics``, ``admission``, ``worker`` and ``process`` are what any server of ours
needs; ``questions`` and ``teacher`` are ``limbeck teach``, ``openai`` is ``limbeck serve``.
"""
