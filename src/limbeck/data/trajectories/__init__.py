"""Runs of agents: files -> checked trajectories -> filtered -> rendered, cut into windows and tokenised.

``reading`` gives raw records of files and the hub, ``formats`` makes a ``trajectory`` of each (``openhands`` of event streams),
``filters`` says which are kept and on which side they stand; ``render``, ``tokens`` and ``windows`` make tokens of them.
"""
