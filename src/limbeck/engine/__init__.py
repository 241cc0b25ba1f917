"""The training loop: steps, optimisers, schedules, precision, sharding, checkpoints, metrics.  It knows no method by name."""
