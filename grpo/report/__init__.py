"""Pages that say what a run, or several runs compared, achieved."""
