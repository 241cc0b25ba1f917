"""The composition root: the only place where parts are put together.  One file a stage, and the runner of recipes."""
