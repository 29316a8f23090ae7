"""The jitted functions of a run, compiled ahead, and what they cost in memory and time."""
