"""What all commands share: their start and end, flags, ranges of numbers."""
