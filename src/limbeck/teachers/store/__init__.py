"""The signal store: what a teacher said about each document, on disk, small, checked and resumable.

``bits`` and ``codecs`` turn rows into bytes, ``blocks`` makes one checked piece of a document, ``shards`` are files of blocks with
an index, ``manifest`` says whose signals these are, and ``store`` puts them together.  ``distillkit`` reads and writes another
toolkit's files.
"""
