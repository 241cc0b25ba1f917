"""Text -> packed, masked, resumable batches.

``sources`` read documents, ``prepare`` turns them into one folder of tokens (split, mixed, shuffled, packed), ``dataset`` reads
rows of it as batches, ``loader`` deals the rows out to steps and ranks.  ``recall`` makes documents up that only looking back
can predict.
"""
