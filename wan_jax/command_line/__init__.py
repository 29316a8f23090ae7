"""What all commands share: how they start and end, their flags, the ranges of numbers."""
