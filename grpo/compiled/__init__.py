"""The jitted functions of a run, compiled ahead of time, with their memory and time."""
