"""What a ternary student is made of."""
