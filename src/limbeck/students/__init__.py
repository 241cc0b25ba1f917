"""Students: what is done to a base model to make one, and which of its parameters train."""
