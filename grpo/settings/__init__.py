"""A recipe's settings: their ranges, checks, and what follows from them alone."""
