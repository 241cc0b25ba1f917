"""Teachers: ``signal(batch, needs)`` from a model in this process, or from the student's own base."""
