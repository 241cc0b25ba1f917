"""Mixers: what replaces softmax attention in a hybrid's layers, one file each."""
