"""Memory, time, wire and disk before a GPU is rented: ``limbeck plan``.  Never imports torch."""
