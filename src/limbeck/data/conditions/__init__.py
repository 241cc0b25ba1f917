"""Real text cut into conditions: the tasks for which adapters are wanted.

A condition is a slice of a source in a format.  ``examples`` reads rows, ``slicing`` cuts a source, ``formats`` writes a text in
another way, ``choice`` says what is held out and mixed, ``build`` makes the folder; ``store`` opens it, ``rows`` gives batches of it
and ``texts`` what a generator reads.
"""
