"""Limbeck as a server.

``refusals``, ``bodies``, ``replies``, ``gate``, ``metrics``, ``worker`` and ``process`` are what any server of ours needs;
``questions`` and ``teacher`` are ``limbeck teach``.
"""
